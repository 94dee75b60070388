"""The engine through the Triton kernels: rows of a mixed batch give the tokens of that adapter alone under peft."""

from functools import partial
from pathlib import Path

import pytest
import torch

from chorus.adapters import pool
from chorus.engine import messages as m
from chorus.engine import runner
from chorus.models import attention, block
from support.engines import make_engine, reference, run
from support.tiny import VOCAB, save_adapter, save_base, solo_greedy

NEW_TOKENS = 2


@pytest.mark.parametrize("family", ["qwen3"])
def test_row_of_a_mixed_batch_equals_the_solo_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    monkeypatch.setattr(attention, "RopePlan", partial(attention.RopePlan, triton=True))
    monkeypatch.setattr(block, "residual_norm", partial(block.residual_norm, triton=True))
    monkeypatch.setattr(block, "silu_mul", partial(block.silu_mul, triton=True))
    monkeypatch.setattr(block, "gelu_tanh_mul", partial(block.gelu_tanh_mul, triton=True))
    monkeypatch.setattr(runner, "AttentionPlan", partial(runner.AttentionPlan, triton=True))
    monkeypatch.setattr(pool.LowRankPlan, "together", partial(pool.LowRankPlan.together, triton=True))
    base = save_base(tmp_path / "base", family)
    adapters = [None, save_adapter(base, tmp_path / "a", 1, r=4), save_adapter(base, tmp_path / "b", 2, r=11)]
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in (14, 5, 19)]
    submits = [
        m.Submit(
            i,
            tuple(prompt),
            m.Sampling(NEW_TOKENS, temperature=0.0, ignore_eos=True),
            reference(base, folder) if folder else None,
        )
        for i, (prompt, folder) in enumerate(zip(prompts, adapters, strict=True))
    ]
    got = run(make_engine(base, block_size=16, max_step_tokens=64), {0: submits})
    for i, (prompt, folder) in enumerate(zip(prompts, adapters, strict=True)):
        tokens, gap = solo_greedy(base, folder, prompt, NEW_TOKENS)
        assert gap > 1e-4
        assert got.tokens[i] == tokens
