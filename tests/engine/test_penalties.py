"""Bias, penalties and bans change logits as the definitions say; what they need to know is counted once."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from chorus.engine import penalties
from chorus.engine.messages import Sampling
from chorus.engine.sequence import Sequence
from chorus.engine.token_counts import TokenCounts
from support.reference_sampler import adjusted

EOS = frozenset({3})
TOKENS = st.lists(st.integers(0, 15), max_size=30)


def sequence(prompt: list[int], output: list[int], **sampling: Any) -> Sequence:
    return Sequence(0, tuple(prompt), Sampling(max_tokens=99, **sampling), output=list(output))


def applied(logits: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
    changed = logits.clone()
    penalties.apply(changed, sequences, EOS)
    return changed


@given(TOKENS, TOKENS, st.lists(st.integers(0, 30), max_size=4))
def test_counts_that_follow_an_output_are_those_of_all_of_it(
    prompt: list[int], output: list[int], read: list[int]
) -> None:
    counts = TokenCounts(prompt)
    for length in [*sorted(read), len(output)]:
        counts.follow(output[:length])
    assert dict(zip(counts.ids, counts.counts, strict=True)) == {
        **dict.fromkeys(prompt, 0),
        **Counter(output),
    }


@pytest.mark.parametrize("penalty", [0.3, 1.0, 1.8])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))
    prompt, outputs = [1, 4, 4], ([7, 1, 9], [15, 15, 0])
    got = applied(logits, [sequence(prompt, output, repetition_penalty=penalty) for output in outputs])
    seen = torch.tensor([[*prompt, *output] for output in outputs])
    assert torch.allclose(got, RepetitionPenaltyLogitsProcessor(penalty)(seen, logits.clone()), rtol=1e-6)
    assert torch.equal(got, logits) == (penalty == 1.0)


def test_each_row_of_a_batch_is_changed_as_it_asks() -> None:
    """Rows with everything, with one thing each, and with nothing, which stay as they are to the bit."""
    asked: list[dict[str, Any]] = [
        {"presence_penalty": 0.7, "frequency_penalty": 0.3, "repetition_penalty": 1.2, "logit_bias": ((4, 9.0),)},
        {},
        {"presence_penalty": -1.5},
        {"frequency_penalty": 2.0},
        {"logit_bias": ((0, -100.0), (15, 3.5))},
        {"min_tokens": 5, "stop_token_ids": frozenset({1, 9})},
        {"min_tokens": 4, "stop_token_ids": frozenset({1, 9})},
        {"repetition_penalty": 0.5, "min_tokens": 5},
    ]
    prompt, output = [2, 3, 4], [4, 4, 1, 7]
    logits = torch.randn(len(asked), 16, generator=torch.Generator().manual_seed(2))
    got = applied(logits, [sequence(prompt, output, **a) for a in asked])
    for row, a in enumerate(asked):
        expected = adjusted(logits[row].tolist(), Sampling(99, **a), prompt, output, EOS)
        np.testing.assert_allclose(got[row].numpy(), expected, rtol=1e-6, err_msg=str(a))
    changed = [row for row in range(len(asked)) if not torch.equal(got[row], logits[row])]
    assert changed == [0, 2, 3, 4, 5, 7]
    assert [penalties.changes_logits(sequence(prompt, output, **a)) for a in asked] == [r in changed for r in range(8)]


def test_an_output_followed_step_by_step_is_penalised_as_one_that_is_counted_anew() -> None:
    """After a preemption, or in another process, a sequence has its tokens and nothing else."""
    generator = torch.Generator().manual_seed(3)
    asked = {"presence_penalty": 0.7, "frequency_penalty": 0.3, "repetition_penalty": 1.2}
    followed = sequence([1, 2, 2], [], **asked)
    for _ in range(40):
        logits = torch.randn(1, 16, generator=generator)
        anew = sequence([1, 2, 2], followed.output, **asked)
        assert torch.equal(applied(logits, [followed]), applied(logits, [anew]))
        assert torch.equal(applied(logits, [followed]), applied(logits, [anew]))  # a step that is run again
        followed.output.append(int(torch.randint(16, (), generator=generator)))


@given(
    st.lists(st.tuples(TOKENS, TOKENS, st.integers(0, 15)), min_size=1, max_size=4),
    st.sampled_from([0.0, 0.7]), st.sampled_from([0.0, 0.3]), st.sampled_from([1.0, 1.2]), st.integers(0, 31),
)  # fmt: skip
def test_a_token_that_is_on_the_device_alone_counts_as_one_of_the_output(
    rows: list[tuple[list[int], list[int], int]], presence: float, frequency: float, repetition: float, minimum: int
) -> None:
    """Whether it is new, in the prompt or in the output already; beside a row that asks for nothing."""
    asked: dict[str, Any] = {
        "presence_penalty": presence,
        "frequency_penalty": frequency,
        "repetition_penalty": repetition,
        "min_tokens": minimum,
        "logit_bias": ((2, 1.5),),
    }
    logits = torch.randn(len(rows) + 1, 16, generator=torch.Generator().manual_seed(4))
    plain, pending = sequence([1], [2]), torch.tensor([5, *(token for _, _, token in rows)])
    known = [plain, *(sequence(prompt, [*output, token], **asked) for prompt, output, token in rows)]
    behind = [plain, *(sequence(prompt, output, **asked) for prompt, output, _ in rows)]
    got = logits.clone()
    penalties.apply(got, behind, EOS, pending)
    assert torch.equal(got, applied(logits, known))


def test_a_pair_that_is_there_twice_says_the_same_both_times() -> None:
    """Which of the two is written last is nobody's business."""
    row, token, count = torch.tensor([0, 0, 2, 2, 0, 2]), torch.tensor([5, 6, 5, 7]), torch.tensor([1, 2, 3, 4])
    tokens, counts = penalties.with_pending(row, token, count, torch.tensor([6, 9, 8]))
    assert tokens.tolist() == [5, 6, 5, 7, 6, 8]
    assert counts.tolist() == [1, 3, 3, 4, 3, 1]


def test_what_was_impossible_stays_so_and_what_was_finite_does_not_overflow() -> None:
    inf = float("inf")
    logits = torch.tensor([[-inf, -3.0, 3.0, 0.0]] * 2)
    asked: dict[str, Any] = {"presence_penalty": -2.0, "logit_bias": ((0, 100.0),)}
    huge = sequence([0, 1, 2, 3], [0], repetition_penalty=1e300, **asked)
    small = sequence([0, 1, 2, 3], [0], repetition_penalty=1e-300, **asked)
    largest = torch.finfo(torch.float32).max
    assert applied(logits, [huge, small]).tolist() == [[-inf, -largest, 0.0, 0.0], [-inf, 0.0, largest, 0.0]]
