"""Blocks stand where transformers' layers stood; what they compute is the parity tests' matter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from chorus.kernels import residual_norm
from chorus.models.base import load_base
from chorus.models.block import Block, norm_of
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
    error = (residual_norm(x, None, norm_of(module)).double() - exact).pow(2).mean().sqrt()
    assert float(error) <= bound * float(exact.pow(2).mean().sqrt())
