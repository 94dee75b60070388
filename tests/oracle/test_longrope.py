"""Two sets of frequencies: each row of a pack has its own, and a sequence that outgrows the short one starts over."""

from pathlib import Path
from typing import Any

import pytest
import torch

from chorus.engine import messages as m
from support.engines import make_engine, run
from support.tiny import FAMILIES, VOCAB, save_base, solo_greedy, solo_logits

BOUNDARY = 24
NEW_TOKENS = 10


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert FAMILIES["phi3-longrope"].rope_parameters["original_max_position_embeddings"] == BOUNDARY
    return save_base(tmp_path_factory.mktemp("longrope"), "phi3-longrope")


def prompt(length: int) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def submit(i: int, length: int, n: int = 1, **sampling: Any) -> m.Submit:
    options = {"max_tokens": NEW_TOKENS, "temperature": 0.0, "ignore_eos": True, **sampling}
    return m.Submit(i, tuple(prompt(length)), m.Sampling(**options), n=n)


@pytest.mark.parametrize("kv_blocks", [128, 20])
def test_rows_on_both_sides_and_across_the_boundary_equal_the_solo_run(base: Path, kv_blocks: int) -> None:
    lengths = [5, 60, BOUNDARY - 9, BOUNDARY - 1, BOUNDARY, BOUNDARY + 1]
    got = run(make_engine(base, kv_blocks=kv_blocks), {i: [submit(i, length)] for i, length in enumerate(lengths)})
    for i, length in enumerate(lengths):
        tokens, gap = solo_greedy(base, None, prompt(length), NEW_TOKENS)
        assert gap > 1e-4
        assert got.tokens[i] == tokens, f"{length} tokens"


def test_the_short_and_the_long_set_differ_here(base: Path) -> None:
    """Or the test above would prove nothing: the same tokens in a longer context give other logits early on."""
    tokens = prompt(BOUNDARY + 1)
    short, long = solo_logits(base, None, tokens[:BOUNDARY]), solo_logits(base, None, tokens)[:BOUNDARY]
    assert (short - long).abs().max() > 1e-2


def test_outputs_that_cross_the_boundary_share_no_page_across_it(base: Path) -> None:
    """Several outputs of one prompt, whose pages they share; every token's log-probability is the solo run's."""
    got = run(make_engine(base), {0: [submit(0, 17, n=3, temperature=1.0, logprobs=0, seed=5)]})
    for index in range(3):
        tokens = got.outputs[0, index]
        told = [
            entry.logprob
            for event in got.events
            if isinstance(event, m.Tokens) and event.index == index
            for entry in event.logprobs
        ]
        for count, (token, logprob) in enumerate(zip(tokens, told, strict=True)):
            oracle = solo_logits(base, None, prompt(17) + tokens[:count])[-1].log_softmax(-1)[token]
            assert logprob == pytest.approx(float(oracle), abs=1e-4), f"output {index}, token {count}"
    assert len({tuple(got.outputs[0, index]) for index in range(3)}) == 3
