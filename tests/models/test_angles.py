"""Angles that are looked up, to the bit what transformers computes."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Phi3Config,
    PhiConfig,
)

from chorus.models import angles

SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32}
SMALL |= {"num_attention_heads": 2, "max_position_embeddings": 1000, "pad_token_id": 0}
ORIGINAL: dict[str, Any] = {"original_max_position_embeddings": 64}
LLAMA3: dict[str, Any] = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0}
LINEAR: dict[str, Any] = {"rope_type": "linear", "factor": 3.0}
LONG: dict[str, Any] = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
THETA: dict[str, Any] = {"rope_theta": 1e4}


def model(config: Any, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    made: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    module: torch.nn.Module = made
    return module


def rotary(module: torch.nn.Module) -> torch.nn.Module:
    (found,) = (name for name, _ in module.named_modules() if name.endswith("rotary_emb"))
    return module.get_submodule(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL),
        LlamaConfig(**SMALL, rope_parameters=LLAMA3 | THETA | ORIGINAL),
        LlamaConfig(**SMALL, rope_parameters=YARN | THETA | ORIGINAL),
        LlamaConfig(**SMALL, rope_parameters=LINEAR | THETA),
        PhiConfig(**SMALL),
        GPTNeoXConfig(**SMALL),
    ],
    ids=["default", "llama3", "yarn", "linear", "phi", "neox"],
)
def test_angles_are_transformers_to_the_bit(config: Any, dtype: torch.dtype) -> None:
    module = model(config, dtype)
    theirs = rotary(module)
    assert angles.look_up_angles(module, config)
    x = torch.empty(1, 7, 64, dtype=dtype)
    for positions in (torch.arange(1000)[None], torch.tensor([[999, 0, 3, 517, 3]]), torch.tensor([[42]])):
        got, want = rotary(module)(x, positions), theirs(x, positions)
        assert got[0].dtype == dtype
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=32),
        Gemma3TextConfig(**SMALL, head_dim=32),
        Phi3Config(**SMALL, **ORIGINAL, rope_parameters=LONG | THETA),
    ],
    ids=["none", "several", "by length"],
)
def test_other_angles_stay_as_they_are(config: Any) -> None:
    module = model(config)
    before = dict(module.named_modules())
    assert not angles.look_up_angles(module, config)
    assert dict(module.named_modules()) == before


def test_a_table_that_would_be_too_long_is_not_made() -> None:
    module, size = model(LlamaConfig(**SMALL)), 2 * 1000 * 32 * 4
    with patch.object(angles, "MOST_BYTES", size - 1):
        assert not angles.look_up_angles(module, LlamaConfig(**SMALL))
    with patch.object(angles, "MOST_BYTES", size):
        assert angles.look_up_angles(module, LlamaConfig(**SMALL))
