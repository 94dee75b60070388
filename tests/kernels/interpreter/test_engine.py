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
    "chorus.models.block.gated_mul": kernels.gated_mul,
    "chorus.engine.runner.AttentionPlan": kernels.AttentionPlan,
    "chorus.adapters.pool.LowRankPlan.together": kernels.LowRankPlan.together,
}


@pytest.fixture(autouse=True)
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, operator in ASKED_ON_CUDA.items():
        monkeypatch.setattr(name, partial(operator, triton=True))


def test_a_prompt_whose_first_piece_wants_no_logits_equals_the_solo_run(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", layers=1)
    adapter = save_adapter(base, tmp_path / "a", 1, r=4)
    prompt = (7, 11, 13, 17, 19, 23)
    submit = m.Submit(0, prompt, m.Sampling(1, temperature=0.0, ignore_eos=True), reference(base, adapter))
    got = run(make_engine(base, block_size=16, max_step_tokens=4), {0: [submit]})
    tokens, gap = solo_greedy(base, adapter, list(prompt), 1)
    assert gap > 1e-4
    assert got.tokens[0] == tokens


def test_row_of_a_mixed_batch_equals_the_solo_run(tmp_path: Path) -> None:
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
