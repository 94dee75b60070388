"""Rank rows are handed out once, in whole pages, neighbours where possible, and come back."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from chorus.adapters.rank_pages import PAGE_ROWS, RankPages

ROWS = 80


class RankPagesMachine(RuleBasedStateMachine):
    """Random loads and evictions of random ranks; a plain set of rows is the model."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = RankPages(ROWS)
        self.owned: list[tuple[int, ...]] = []

    @rule(rank=st.integers(1, 40))
    def allocate(self, rank: int) -> None:
        room = self.pages.fits(rank)
        rows = self.pages.allocate(rank)
        assert (rows is not None) == room
        if rows is not None:
            assert len(rows) == rank
            self.owned.append(rows)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.pages.free(self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1))))

    @invariant()
    def no_row_has_two_owners_and_whole_pages_are_counted(self) -> None:
        rows = [row for owned in self.owned for row in owned]
        assert len(rows) == len(set(rows))
        assert all(0 <= row < ROWS for row in rows)
        assert self.pages.rows_used == len({row // PAGE_ROWS for row in rows}) * PAGE_ROWS
        self.pages.check_integrity(self.owned)


TestRankPages = RankPagesMachine.TestCase


def test_neighbours_where_possible_scattered_where_not() -> None:
    pages = RankPages(32)
    a, b, c = pages.allocate(8), pages.allocate(8), pages.allocate(8)
    assert a is not None
    assert b is not None
    assert c == tuple(range(16, 24))
    pages.free(a)
    assert pages.allocate(9) == (*range(0, 8), 24)
    assert pages.allocate(1) is None


def test_a_page_of_nobody_or_of_two_is_found() -> None:
    pages = RankPages(24)
    one, two = pages.allocate(8), pages.allocate(3)
    assert one is not None
    assert two is not None
    pages.check_integrity([two, one])
    with pytest.raises(AssertionError, match="leaked"):
        pages.check_integrity([one])
    with pytest.raises(AssertionError, match="two owners"):
        pages.check_integrity([one, two, two])


def test_freeing_twice_is_refused() -> None:
    pages = RankPages(16)
    rows = pages.allocate(3)
    assert rows is not None
    pages.free(rows)
    with pytest.raises(ValueError, match="not allocated"):
        pages.free(rows)
