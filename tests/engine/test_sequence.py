"""A sequence's tokens, prompt and output as one."""

from hypothesis import given
from hypothesis import strategies as st

from chorus.engine.messages import AdapterRef, Sampling, Submit, TokenLogprob
from chorus.engine.sequence import Sequence, outputs_of

TOKENS = st.lists(st.integers(0, 99), max_size=12)


@given(TOKENS, TOKENS, st.integers(0, 30), st.integers(0, 30))
def test_a_slice_reads_through_prompt_and_output(prompt: list[int], output: list[int], start: int, count: int) -> None:
    seq = Sequence(1, tuple(prompt), Sampling(max_tokens=1), output=output)
    assert seq.token_slice(start, count) == (prompt + output)[start : start + count]


def test_what_remains_is_what_is_not_in_the_cache() -> None:
    seq = Sequence(1, (5, 6, 7), Sampling(max_tokens=1), output=[8], computed=3)
    assert (seq.length, seq.remaining) == (4, 1)


def test_sequences_are_told_apart_by_identity() -> None:
    one, two = (Sequence(1, (5,), Sampling(max_tokens=1)) for _ in range(2))
    assert one != two
    assert len({one, two}) == 2


def test_outputs_differ_in_their_seeds_alone() -> None:
    adapter = AdapterRef("a", "/a")
    sampling = Sampling(max_tokens=5, temperature=0.5, seed=2**64 - 2, logprobs=1)
    outputs = outputs_of(Submit(4, (5, 6), sampling, adapter, priority=2, deadline=9.0, n=4), now=3.0)
    assert [seq.key for seq in outputs] == [(4, 0), (4, 1), (4, 2), (4, 3)]
    assert [seq.sampling.seed for seq in outputs] == [2**64 - 2, 2**64 - 1, 0, 1]
    shared = [(s.prompt, s.adapter, s.priority, s.deadline, s.arrival, s.sampling.logprobs) for s in outputs]
    assert shared == [((5, 6), adapter, 2, 9.0, 3.0, 1)] * 4


def test_the_first_output_alone_tells_of_the_prompt() -> None:
    outputs = outputs_of(Submit(4, (5, 6), Sampling(max_tokens=5, prompt_logprobs=0), n=3), now=0.0)
    assert [list(seq.untold_rows(0, 2)) for seq in outputs] == [[0], [], []]


@given(
    length=st.integers(1, 12), told_from=st.integers(1, 14), cuts=st.lists(st.integers(1, 5), min_size=12, max_size=12)
)
def test_chunks_tell_each_token_of_the_prompt_once_also_if_they_are_computed_again(
    length: int, told_from: int, cuts: list[int]
) -> None:
    sampling = Sampling(max_tokens=1, prompt_logprobs=0, prompt_logprobs_from=told_from)
    seq = Sequence(1, tuple(range(length)), sampling)
    told = []
    for start, count in _chunks(length, cuts[:2]) + _chunks(length, cuts):  # preempted after two chunks
        rows = seq.untold_rows(start, count)
        told += [row + 1 for row in rows]
        seq.prompt_logprobs += [TokenLogprob(0.0)] * len(rows)
    assert told == list(range(told_from, length))


def _chunks(length: int, cuts: list[int]) -> list[tuple[int, int]]:
    chunks, start = [], 0
    for cut in cuts:
        if start < length:
            chunks.append((start, min(cut, length - start)))
            start += cut
    return chunks
