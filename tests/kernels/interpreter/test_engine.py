"""The engine through the Triton kernels: rows of a mixed batch give the tokens of that adapter alone under peft."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from chorus import kernels
from chorus.engine import messages as m
from support.engines import make_engine, reference, run
from support.tiny import VOCAB, save_adapter, save_base, solo_greedy

NEW_TOKENS = 2
ASKED_ON_CUDA: dict[str, Callable[..., Any]] = {
    "chorus.models.attention.RopePlan": kernels.RopePlan,
    "chorus.models.block.residual_norm": kernels.residual_norm,
    "chorus.models.block.silu_mul": kernels.silu_mul,
    "chorus.engine.runner.AttentionPlan": kernels.AttentionPlan,
    "chorus.adapters.pool.LowRankPlan.together": kernels.LowRankPlan.together,
}


def test_row_of_a_mixed_batch_equals_the_solo_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, operator in ASKED_ON_CUDA.items():
        monkeypatch.setattr(name, partial(operator, triton=True))
    base = save_base(tmp_path / "base", "qwen3", layers=2)
    adapters = [None, save_adapter(base, tmp_path / "a", 1, r=4), save_adapter(base, tmp_path / "b", 2, r=11)]
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in (14, 5, 19)]
    sampling = m.Sampling(NEW_TOKENS, temperature=0.0, ignore_eos=True)
    submits: list[m.Command] = [
        m.Submit(i, tuple(prompt), sampling, reference(base, folder) if folder else None)
        for i, (prompt, folder) in enumerate(zip(prompts, adapters, strict=True))
    ]
    got = run(make_engine(base, block_size=16, max_step_tokens=64), {0: submits})
    for i, (prompt, folder) in enumerate(zip(prompts, adapters, strict=True)):
        tokens, gap = solo_greedy(base, folder, prompt, NEW_TOKENS)
        assert gap > 1e-4
        assert got.tokens[i] == tokens
