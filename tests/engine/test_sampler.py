"""Sampling: exact filters against definitions written out token by token, draws against the distribution they claim."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chorus.engine.messages import Sampling
from chorus.engine.sampler import NOT_FINITE, filter_probabilities, sample, uniform
from chorus.engine.sequence import Sequence

NO_EOS: frozenset[int] = frozenset()


def sequence(output: int = 0, **sampling: object) -> Sequence:
    seq = Sequence(0, (1,), Sampling(max_tokens=99, **sampling))  # type: ignore[arg-type]
    seq.output = [5] * output
    return seq


def kept_by_definition(
    logits: list[float], temperature: float, min_p: float, top_k: int, top_p: float
) -> dict[int, float]:
    """Token -> probability, from the definitions, in plain Python."""
    top = max(logits)
    weights = {i: math.exp((x - top) / temperature) for i, x in enumerate(logits)}
    likeliest = max(weights.values())
    if min_p > 0:
        weights = {i: w for i, w in weights.items() if w >= min_p * likeliest}
    ranked = sorted(weights, key=lambda i: (-weights[i], i))
    if top_k:
        ranked = ranked[:top_k]
    mass, total, kept = 0.0, sum(weights[i] for i in ranked), []
    for i in ranked:
        if top_p < 1 and mass / total >= top_p:
            break
        kept.append(i)
        mass += weights[i]
    return {i: weights[i] / mass for i in kept}


@settings(max_examples=150, deadline=None)
@given(
    logits=st.lists(st.integers(-40, 40), min_size=1, max_size=12, unique=True),
    temperature=st.floats(0.05, 5),
    min_p=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
)
def test_filters_keep_what_their_definitions_keep(
    logits: list[int], temperature: float, min_p: float, top_k: int, top_p: float
) -> None:
    values = [x / 8 for x in logits]
    got = filter_probabilities(
        torch.tensor([values, values], dtype=torch.float64),
        torch.tensor([temperature] * 2),
        torch.tensor([min_p] * 2, dtype=torch.float64),
        torch.tensor([top_k] * 2),
        torch.tensor([top_p] * 2, dtype=torch.float64),
    )
    expected = kept_by_definition(values, float(torch.tensor(temperature)), min_p, top_k, top_p)
    for row in got:
        assert {i for i, p in enumerate(row.tolist()) if p > 0} == set(expected)
        for i, p in expected.items():
            assert row[i].item() == pytest.approx(p, rel=1e-6)


def test_draws_follow_the_distribution() -> None:
    """Chi-squared over 20,000 seeds against softmax, 7 degrees of freedom; 24.3 is the 0.1 % point."""
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1, -0.4, 0.9, -2.0])
    draws = 20_000
    seqs = [sequence(seed=s) for s in range(draws)]
    counts = Counter(sample(logits.repeat(draws, 1), seqs, NO_EOS))
    expected = torch.softmax(logits.double(), 0) * draws
    statistic = sum((counts[i] - float(e)) ** 2 / float(e) for i, e in enumerate(expected))
    assert statistic < 24.3


def test_noise_is_uniform_and_independent_of_the_batch() -> None:
    values = [uniform(seed, position) for seed in range(200) for position in range(50)]
    assert all(0 <= v < 1 for v in values)
    bins = Counter(int(v * 10) for v in values)
    assert sum((bins[b] - 1000) ** 2 / 1000 for b in range(10)) < 27.9  # 0.1 % point, 9 degrees of freedom
    logits = torch.randn(6, 50)
    seqs = [sequence(output=i, seed=i, temperature=0.7 + i / 10, top_k=i * 5, top_p=1 - i / 20) for i in range(6)]
    together = sample(logits.clone(), seqs, NO_EOS)
    alone = [sample(logits[i : i + 1].clone(), [seqs[i]], NO_EOS)[0] for i in range(6)]
    assert together == alone


def test_greedy_is_the_likeliest_whatever_else_is_asked() -> None:
    logits = torch.randn(3, 40)
    seqs = [sequence(temperature=0.0, top_k=3, top_p=0.5), sequence(temperature=0.0), sequence(top_k=1, seed=9)]
    assert sample(logits.clone(), seqs, NO_EOS) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
def test_extreme_parameters_still_draw_a_token_that_has_mass(seed: int) -> None:
    logits = torch.tensor([[0.0, -1e4, 30.0, float("-inf")]] * 3)
    seqs = [sequence(seed=seed, temperature=t, top_p=1e-9 if t > 1 else 1.0) for t in (1e-3, 1.0, 10.0)]
    assert all(token in (0, 2) for token in sample(logits, seqs, NO_EOS))


def test_min_tokens_bans_every_early_stop() -> None:
    logits = torch.tensor([[0.0, 9.0, 8.0, 7.0]] * 4)
    stops = frozenset([2])
    seqs = [
        sequence(temperature=0.0, min_tokens=1, stop_token_ids=stops),
        sequence(temperature=1.0, min_tokens=1, stop_token_ids=stops, top_k=1),
        sequence(output=1, temperature=0.0, min_tokens=1, stop_token_ids=stops),
        sequence(temperature=0.0),
    ]
    assert sample(logits, seqs, frozenset([1])) == [3, 3, 1, 1]


def test_rows_that_are_not_finite_are_reported_and_others_are_not_touched() -> None:
    logits = torch.zeros(4, 5)
    logits[0, 3] = float("nan")
    logits[1, 3] = 1.0
    logits[2, 1] = float("nan")
    logits[3, :] = float("inf")
    seqs = [sequence(temperature=0.0), sequence(temperature=0.0), sequence(seed=3), sequence(temperature=0.0)]
    assert sample(logits, seqs, NO_EOS) == [NOT_FINITE, 3, NOT_FINITE, NOT_FINITE]
