"""Rank rows are handed out once, in whole pages, neighbours where possible, and come back."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from chorus.adapters.rank_pages import PAGE_ROWS, RankPages, Rows, rows_of

ROWS = 80
SITES = ("q", "k", "head")


class RankPagesMachine(RuleBasedStateMachine):
    """Random loads and evictions of random ranks at random sites; plain sets of rows are the model."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = RankPages(SITES, ROWS)
        self.owned: list[dict[str, Rows]] = []

    @rule(ranks=st.dictionaries(st.sampled_from(SITES), st.integers(1, 40)))
    def allocate(self, ranks: dict[str, int]) -> None:
        before = {site: len(self.pages_at(site)) for site in ranks}
        room = all(before[site] + rows_of(rank) // PAGE_ROWS <= ROWS // PAGE_ROWS for site, rank in ranks.items())
        rows = self.pages.allocate(ranks)
        assert (rows is not None) == room
        if rows is not None:
            assert {site: len(own) for site, own in rows.items()} == ranks
            self.owned.append(rows)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.pages.free(self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1))))

    @invariant()
    def no_row_has_two_owners_and_whole_pages_are_counted(self) -> None:
        for site in SITES:
            rows = [row for owned in self.owned for row in owned.get(site, ())]
            assert len(rows) == len(set(rows))
            assert all(0 <= row < ROWS for row in rows)
            assert self.pages.rows_used_at(site) == len(self.pages_at(site)) * PAGE_ROWS
        assert self.pages.rows_used == sum(map(self.pages.rows_used_at, SITES))
        self.pages.check_integrity(self.owned)

    def pages_at(self, site: str) -> set[int]:
        return {row // PAGE_ROWS for owned in self.owned for row in owned.get(site, ())}


TestRankPages = RankPagesMachine.TestCase


def given(pages: RankPages, **ranks: int) -> dict[str, Rows]:
    rows = pages.allocate(ranks)
    assert rows is not None
    return rows


def test_neighbours_where_possible_scattered_where_not() -> None:
    pages = RankPages(["q"], 32)
    first, _, third = given(pages, q=8), given(pages, q=8), given(pages, q=8)
    assert third["q"] == tuple(range(16, 24))
    pages.free(first)
    assert given(pages, q=9)["q"] == (*range(8), 24)
    assert pages.allocate({"q": 1}) is None


def test_sites_with_the_same_rows_share_their_tuple_however_they_came_by_them() -> None:
    pages = RankPages(["q", "k"], 32)
    both, alone = given(pages, q=8, k=8), given(pages, q=8)
    assert both["q"] is both["k"]
    pages.free(both)
    again = given(pages, q=8, k=8)
    assert again["q"] == again["k"] == tuple(range(8))
    assert again["q"] is again["k"]
    assert alone["q"] == tuple(range(8, 16))


def test_nothing_is_taken_where_a_site_has_no_room() -> None:
    pages = RankPages(["q", "k"], 16)
    given(pages, k=16)
    assert pages.allocate({"q": 8, "k": 1}) is None
    assert (pages.rows_used, pages.rows_used_at("q")) == (16, 0)


def test_a_page_of_nobody_or_of_two_is_found() -> None:
    pages = RankPages(["q", "k"], 24)
    one, two = given(pages, q=8), given(pages, q=3, k=3)
    pages.check_integrity([two, one])
    with pytest.raises(AssertionError, match="leaked"):
        pages.check_integrity([two])
    with pytest.raises(AssertionError, match="two owners"):
        pages.check_integrity([one, two, two])


def test_freeing_twice_is_refused_and_frees_nothing() -> None:
    pages = RankPages(["q", "k"], 16)
    rows, other = given(pages, q=3), given(pages, k=3)
    pages.free(rows)
    with pytest.raises(ValueError, match="at q are not allocated"):
        pages.free({**other, **rows})
    pages.check_integrity([other])
