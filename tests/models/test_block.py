"""Blocks stand where transformers' layers stood; what they compute is the parity tests' matter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from chorus.models.base import load_base
from chorus.models.block import Block, norm_of, rotate
from chorus.models.families import FAMILIES
from support.tiny import FAMILIES as TINY
from support.tiny import save_base


@pytest.mark.parametrize("family", TINY)
def test_plain_families_run_blocks_at_the_same_paths(tmp_path: Path, family: str) -> None:
    folder = save_base(tmp_path, family)
    base = load_base(str(folder), device="cpu", dtype="float32")
    blocks = [name for name, part in base.module.named_modules() if isinstance(part, Block)]
    plain = FAMILIES[base.module.config.model_type].plain_block
    assert len(blocks) == (base.layers if plain else 0)
    for name, layer in base.adapted.items():
        assert base.module.get_submodule(name) is layer


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("made", [LlamaRMSNorm, GemmaRMSNorm])
def test_a_norm_equals_float64_math(made: Any, dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(0)
    module = made(96).to(dtype).requires_grad_(False)
    module.weight.add_(torch.randn(96).to(dtype))
    x = (torch.randn(7, 96) * torch.logspace(-3, 3, 7)[:, None]).to(dtype)
    weight = module.weight.double() + (made is GemmaRMSNorm)
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    error = (norm_of(module)(x).double() - exact).pow(2).mean().sqrt()
    assert float(error) <= bound * float(exact.pow(2).mean().sqrt())


@pytest.mark.parametrize("width", [64, 24])
def test_rotation_is_transformers(width: int) -> None:
    torch.manual_seed(0)
    x, angles = torch.randn(5, 3, 64), torch.randn(5, width // 2)
    cos, sin = (torch.cat((part, part), dim=-1) for part in (angles.cos(), angles.sin()))
    turned, _ = apply_rotary_pos_emb(x[None, ..., :width], x[None, ..., :width], cos[None], sin[None], unsqueeze_dim=2)
    want = torch.cat((turned[0], x[..., width:]), dim=-1)
    assert torch.allclose(rotate(x, cos, sin), want, atol=1e-6)
