"""Draws follow the distribution that vLLM's definitions give, whatever the parameters, the logits and the batch."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from chorus.engine import filters, sampler
from chorus.engine.messages import Sampling
from chorus.engine.sampler import NOT_FINITE, draw, sample, uniform
from chorus.engine.sequence import Sequence
from support.reference_sampler import chi_squared, distribution

NO_EOS: frozenset[int] = frozenset()
DRAWS = 10_000
PROMPT = (3, 5, 5, 9)
OUTPUT = [5, 11, 11, 11, 2]
EOS = frozenset({0})
NEG_INF = float("-inf")


def sequence(prompt: tuple[int, ...] = (1,), output: list[int] | None = None, **sampling: Any) -> Sequence:
    return Sequence(0, prompt, Sampling(**{"max_tokens": 99, **sampling}), output=output or [])


def draws(logits: torch.Tensor, count: int = DRAWS, **sampling: Any) -> np.ndarray:
    """How often each token is drawn from one row of logits with seeds 0, 1, ..."""
    seqs = [sequence(PROMPT, OUTPUT, seed=seed, **sampling) for seed in range(count)]
    return np.bincount(sample(logits.repeat(count, 1), seqs, EOS), minlength=len(logits)).astype(float)


ALONE: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.6},
    "hot": {"temperature": 1.8},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.2},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.9},
    "negative frequency": {"frequency_penalty": -0.7},
    "repetition": {"repetition_penalty": 1.7},
    "repetition below 1": {"repetition_penalty": 0.5},
    "logit_bias": {"logit_bias": ((4, 2.5), (11, -3.0), (17, 100.0), (18, 99.0))},
    "min_tokens": {"min_tokens": 6, "stop_token_ids": frozenset({5, 8})},
}
COMBINED: dict[str, dict[str, Any]] = {
    "filters": {"temperature": 0.8, "top_k": 12, "top_p": 0.85, "min_p": 0.05},
    "penalties": {"presence_penalty": -0.8, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
    "all": {
        "temperature": 1.3,
        "top_k": 15,
        "top_p": 0.9,
        "min_p": 0.04,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.2,
        "logit_bias": ((2, 1.5), (7, -1.0)),
        "min_tokens": 6,
        "stop_token_ids": frozenset({8}),
    },
}


@pytest.mark.parametrize("parameters", [*ALONE.values(), *COMBINED.values()], ids=[*ALONE, *COMBINED])
def test_draws_follow_the_reference_and_not_the_model_alone(parameters: dict[str, Any]) -> None:
    logits = torch.randn(24, generator=torch.Generator().manual_seed(1)) * 1.5
    counts = draws(logits, **parameters)
    sampling = Sampling(99, **parameters)
    statistic, limit = chi_squared(counts, distribution(logits.tolist(), sampling, PROMPT, OUTPUT, EOS))
    assert statistic < limit
    statistic, limit = chi_squared(counts, distribution(logits.tolist(), Sampling(99)))
    assert statistic > limit, "the test could not tell this parameter from none"


@pytest.mark.gpu
@pytest.mark.parametrize("parameters", [*ALONE.values(), *COMBINED.values()], ids=[*ALONE, *COMBINED])
def test_draws_follow_the_reference_on_cuda(parameters: dict[str, Any]) -> None:
    logits = torch.randn(24, generator=torch.Generator().manual_seed(1)) * 1.5
    counts = draws(logits.cuda(), **parameters)
    sampling = Sampling(99, **parameters)
    statistic, limit = chi_squared(counts, distribution(logits.tolist(), sampling, PROMPT, OUTPUT, EOS))
    assert statistic < limit


def test_draws_follow_the_reference_however_many_tokens_must_be_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows whose filters keep few tokens, more, and nearly all, in one batch."""
    monkeypatch.setattr(filters, "WIDTHS", (4, 32))
    logits = torch.randn(300, generator=torch.Generator().manual_seed(2)) * 1.3
    kinds: dict[int, dict[str, Any]] = {
        3: {"top_k": 3},
        2: {"top_p": 0.06},
        17: {"top_p": 0.35},
        32: {"top_k": 32, "min_p": 0.001},
        151: {"top_p": 0.9},
        104: {"top_k": 150, "top_p": 0.9},
        300: {},
    }
    seqs = [sequence(seed=seed, **kind) for seed in range(DRAWS // 2) for kind in kinds.values()]
    tokens = sample(logits.repeat(len(seqs), 1), seqs, NO_EOS)
    for i, (kept, kind) in enumerate(kinds.items()):
        expected = distribution(logits.tolist(), Sampling(99, **kind))
        assert (expected > 0).sum() == kept
        counts = np.bincount(tokens[i :: len(kinds)], minlength=300).astype(float)
        statistic, limit = chi_squared(counts, expected)
        assert statistic < limit, kind


@pytest.mark.parametrize(
    ("parameters", "processors"),
    [
        ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({"min_p": 0.15}, [MinPLogitsWarper(0.15)]),
        ({"top_k": 6}, [TopKLogitsWarper(6)]),
        ({"top_p": 0.77}, [TopPLogitsWarper(0.77)]),
        ({"repetition_penalty": 1.4}, [RepetitionPenaltyLogitsProcessor(1.4)]),
        ({"repetition_penalty": 0.6}, [RepetitionPenaltyLogitsProcessor(0.6)]),
        (
            {"repetition_penalty": 1.2, "temperature": 1.5, "min_p": 0.03, "top_k": 14, "top_p": 0.83},
            [
                RepetitionPenaltyLogitsProcessor(1.2),
                TemperatureLogitsWarper(1.5),
                MinPLogitsWarper(0.03),
                TopKLogitsWarper(14),
                TopPLogitsWarper(0.83),
            ],
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_the_distribution_is_that_of_transformers_processors(
    monkeypatch: pytest.MonkeyPatch, parameters: dict[str, Any], processors: list[Any]
) -> None:
    """With evenly spaced noise a token of probability p is drawn p * N times, give or take one."""
    monkeypatch.setattr(sampler, "uniform", lambda seed, position: (seed + 0.5) / DRAWS)
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3)) * 2
    seen: Any = torch.tensor([[*PROMPT, *OUTPUT]])
    processed = LogitsProcessorList(processors)(seen, logits.clone()[None])[0]
    expected = torch.softmax(processed.double(), -1).numpy()
    counts = draws(logits, **parameters)
    assert np.abs(counts - expected * DRAWS).max() <= 1.01
    assert not counts[expected == 0].any()


@pytest.mark.parametrize("parameters", [*ALONE.values(), *COMBINED.values()], ids=[*ALONE, *COMBINED])
def test_greedy_takes_the_likeliest_after_bias_and_penalties(parameters: dict[str, Any]) -> None:
    rows = torch.randn(50, 24, generator=torch.Generator().manual_seed(4)) * 1.5
    greedy = {**parameters, "temperature": 0.0}
    sampling = Sampling(99, **greedy)
    expected = [int(distribution(row, sampling, PROMPT, OUTPUT, EOS).argmax()) for row in rows.tolist()]
    assert sample(rows, [sequence(PROMPT, OUTPUT, **greedy)] * 50, EOS) == expected


ONE_FINITE = st.tuples(st.integers(0, 8), st.sampled_from([0.0, 5.0, 1e30, -1e30]), st.integers(0, 8)).map(
    lambda t: [NEG_INF] * t[0] + [t[1]] + [NEG_INF] * t[2]
)
ORDINARY = st.lists(st.integers(-40, 40).map(lambda x: x / 8), min_size=1, max_size=12)
EQUAL = st.lists(st.sampled_from([1.0, 1.0, 1.0, NEG_INF]), max_size=11).map(lambda row: [1.0, *row])
EXTREME = st.lists(st.sampled_from([3e38, -3e38, 0.0, -0.0, 1e-40, NEG_INF]), max_size=6).map(lambda row: [0.0, *row])
PARAMETERS = {
    "temperature": st.sampled_from([0.0, 1e-4, 0.3, 1.0, 2.0]),
    "min_p": st.sampled_from([0.0, 0.13, 1.0]),
    "top_k": st.integers(0, 14),
    # Values that no sum of equal shares meets, so that rounding does not decide.
    "top_p": st.sampled_from([1e-300, 1e-9, 0.0713, 0.5317, 0.9173, 1.0]),
    "presence_penalty": st.sampled_from([0.0, 2.0, -2.0]),
    "frequency_penalty": st.sampled_from([0.0, 2.0]),
    "repetition_penalty": st.sampled_from([1.0, 2.0, 0.5]),
    "logit_bias": st.sampled_from([(), ((0, 100.0),), ((0, -100.0),)]),
    "seed": st.sampled_from([0, 1, 2**63, 2**64 - 1]),
}


def a_sequence(data: st.DataObject, vocabulary: int, **parameters: st.SearchStrategy[Any]) -> Sequence:
    tokens = st.lists(st.integers(0, vocabulary - 1), max_size=5)
    sampling = data.draw(st.fixed_dictionaries({**PARAMETERS, **parameters}))
    return sequence(tuple(data.draw(tokens)), data.draw(tokens), **sampling)


@settings(max_examples=300, deadline=None)
@given(logits=st.one_of(ORDINARY, EQUAL, ONE_FINITE.filter(lambda row: max(row) < 10)), data=st.data())
def test_a_token_that_the_reference_filters_out_is_never_drawn(logits: list[float], data: st.DataObject) -> None:
    seq = a_sequence(data, len(logits))
    (token,) = sample(torch.tensor([logits]), [seq], NO_EOS)
    assert distribution(logits, seq.sampling, seq.prompt, seq.output)[token] > 0


@settings(max_examples=300, deadline=None)
@given(logits=st.one_of(EXTREME, EQUAL, ONE_FINITE), data=st.data())
def test_whatever_is_asked_of_extreme_rows_a_token_with_mass_is_drawn(logits: list[float], data: st.DataObject) -> None:
    """Neither an overflow nor a huge penalty, nor penalties on all there is, make a good row look broken."""
    seq = a_sequence(data, len(logits), repetition_penalty=st.sampled_from([1e-300, 1e300, 2.0]))
    (token,) = sample(torch.tensor([logits]), [seq], NO_EOS)
    assert token != NOT_FINITE
    assert logits[token] > NEG_INF


def test_noise_is_uniform_and_independent_of_the_batch() -> None:
    values = [uniform(seed, position) for seed in range(200) for position in range(50)]
    assert all(0 <= v < 1 for v in values)
    counts = np.bincount([int(v * 10) for v in values], minlength=10).astype(float)
    statistic, limit = chi_squared(counts, np.full(10, 0.1))
    assert statistic < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_gives_the_same_token_in_any_batch(dtype: torch.dtype) -> None:
    logits = torch.randn(16, 2100, generator=torch.Generator().manual_seed(5)).to(dtype)
    kinds = [*ALONE.values(), *COMBINED.values(), {"temperature": 0.0}]
    seqs = [sequence(PROMPT, OUTPUT, **{**kind, "seed": seed}) for seed, kind in enumerate(kinds)]
    assert len(seqs) == 16
    together = sample(logits, seqs, EOS)
    assert together == [sample(logits[i : i + 1], [seqs[i]], EOS)[0] for i in range(16)]
    backwards = sample(logits.flip(0), seqs[::-1], EOS)
    assert together == backwards[::-1]


def test_a_token_that_is_on_the_device_alone_is_as_good_as_one_of_the_output() -> None:
    logits = torch.randn(17, 2100, generator=torch.Generator().manual_seed(6))
    kinds = [{"temperature": 0.0}, *ALONE.values(), *COMBINED.values(), {"temperature": 0.0, "min_tokens": 6}]
    pending = list(range(2, 2 + len(kinds)))
    known = [sequence(PROMPT, [*OUTPUT, token], **kind) for kind, token in zip(kinds, pending, strict=True)]
    behind = [sequence(PROMPT, OUTPUT, **kind) for kind in kinds]
    assert draw(logits, behind, EOS, torch.tensor(pending)).tolist() == sample(logits, known, EOS)


def test_logits_are_left_as_the_model_gave_them() -> None:
    logits = torch.randn(16, 50)
    before = logits.clone()
    sample(logits, [sequence(PROMPT, OUTPUT, **kind) for kind in [*ALONE.values(), *COMBINED.values(), {}]], EOS)
    assert torch.equal(logits, before)


def test_equal_logits_are_cut_at_the_smaller_ids() -> None:
    """Ten likeliest tokens in bf16 are often equal; which of them stay must not depend on the machine."""
    logits = torch.zeros(1000)
    logits[[900, 500, 100]] = 4.0
    assert set(np.flatnonzero(draws(logits, 300, top_k=2))) == {100, 500}
    assert set(np.flatnonzero(draws(logits, 300, top_k=5))) == {0, 1, 100, 500, 900}
    assert set(np.flatnonzero(draws(torch.zeros(8), 300, top_p=0.5))) == {0, 1, 2, 3}


def test_min_tokens_bans_every_early_stop() -> None:
    logits = torch.tensor([[0.0, 9.0, 8.0, 7.0]] * 5)
    early: dict[str, Any] = {"min_tokens": 1, "stop_token_ids": frozenset([2])}
    seqs = [
        sequence(temperature=0.0, **early),
        sequence(temperature=1.0, top_k=1, **early),
        sequence(output=[3], temperature=0.0, **early),
        sequence(temperature=0.0),
        sequence(temperature=0.0, ignore_eos=True, logit_bias=((1, 100.0),), **early),
    ]
    assert sample(logits, seqs, frozenset([1])) == [3, 3, 1, 1, 3]


def test_a_row_whose_tokens_are_all_banned_is_reported() -> None:
    banned: dict[str, Any] = {"min_tokens": 1, "stop_token_ids": frozenset([0, 1, 2])}
    seqs = [sequence(**banned, top_k=2), sequence(**banned), sequence(**banned, temperature=0.0), sequence(top_k=1)]
    assert sample(torch.tensor([[1.0, 2.0, 3.0]] * 4), seqs, NO_EOS) == [NOT_FINITE] * 3 + [2]


@pytest.mark.parametrize("kind", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"presence_penalty": 1.0}, {"top_k": 3}])
def test_rows_that_are_not_finite_are_reported_and_others_are_not_touched(kind: dict[str, Any]) -> None:
    logits = torch.zeros(5, 5)
    logits[:, 3] = 200.0
    good = [1, 4]
    logits[0, 1] = float("nan")
    logits[2, :] = float("inf")
    logits[3, :] = NEG_INF
    seqs = [sequence(output=[1], **kind) for _ in range(5)]
    tokens = sample(logits, seqs, NO_EOS)
    assert [tokens[i] for i in good] == [3, 3]
    assert [tokens[i] for i in (0, 2, 3)] == [NOT_FINITE] * 3


def test_seeds_and_positions_each_make_other_draws() -> None:
    logits = torch.zeros(1, 1000)
    at_start = [sample(logits, [sequence(seed=seed)], NO_EOS)[0] for seed in range(50)]
    as_it_goes = [sample(logits, [sequence(output=[1] * n, seed=7)], NO_EOS)[0] for n in range(50)]
    assert min(len(Counter(at_start)), len(Counter(as_it_goes))) > 40
