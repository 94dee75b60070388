"""A sequence's tokens, prompt and output as one."""

from hypothesis import given
from hypothesis import strategies as st

from chorus.engine.messages import Sampling
from chorus.engine.sequence import Sequence

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
