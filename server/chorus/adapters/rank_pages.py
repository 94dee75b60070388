"""Who owns which rank rows of the sites' pools. Bookkeeping only, no tensors.

Rows are handed out in pages of 8, neighbours where possible (a contiguous run is read as a view, a scattered one has to
be gathered). The last page of an adapter may be partly empty; nothing else is wasted.

A site's free pages are the bits of a number. Most sites have the same ones, and are given the same: what was found for
one is looked up for the next.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

PAGE_ROWS = 8

Rows = tuple[int, ...]


class RankPages:
    """`rows` rank rows at each site, a multiple of PAGE_ROWS."""

    def __init__(self, sites: Iterable[str], rows: int) -> None:
        if rows < PAGE_ROWS or rows % PAGE_ROWS:
            raise ValueError(f"rows: want a positive multiple of {PAGE_ROWS}, got {rows}")
        self._pages = rows // PAGE_ROWS
        self._free = dict.fromkeys(sites, (1 << self._pages) - 1)
        self.rows_total = rows * len(self._free)
        """Of all sites together; so is `rows_used`."""
        self.rows_used = 0

    def rows_used_at(self, site: str) -> int:
        return (self._pages - self._free[site].bit_count()) * PAGE_ROWS

    def allocate(self, ranks: Mapping[str, int]) -> dict[str, Rows] | None:
        """Row numbers for each site's rank rows, in rank order; None, and nothing taken, when a site has too few.

        Sites with equal rows get the same tuple.
        """
        found: dict[tuple[int, int], tuple[Rows, int] | None] = {}
        rows: dict[str, Rows] = {}
        left: dict[str, int] = {}
        for site, rank in ranks.items():
            key = (self._free[site], rank)
            if key not in found:
                found[key] = _find(*key)
            if (taken := found[key]) is None:
                return None
            rows[site], left[site] = taken
        self._free |= left
        self.rows_used += sum(map(rows_of, ranks.values()))
        return _shared(rows)

    def free(self, rows: Mapping[str, Rows]) -> None:
        """Gives back what `allocate` handed out.

        Raises:
            ValueError: somewhere it is not handed out. Then nothing is given back.
        """
        bits: dict[int, int] = {}
        for own in rows.values():
            if id(own) not in bits:
                bits[id(own)] = sum(1 << page for page in {row // PAGE_ROWS for row in own})
        left = {site: self._free[site] | bits[id(own)] for site, own in rows.items()}
        for site, own in rows.items():
            if self._free[site] & bits[id(own)]:
                raise ValueError(f"rows at {site} are not allocated")
        self._free |= left
        self.rows_used -= sum(rows_of(len(own)) for own in rows.values())

    def check_integrity(self, owners: Iterable[Mapping[str, Rows]]) -> None:
        """Raises AssertionError when a page belongs to nobody, or to two: `owners` are all that `allocate` gave."""
        owned: dict[str, Counter[int]] = {site: Counter() for site in self._free}
        for rows in owners:
            for site, own in rows.items():
                owned[site].update({row // PAGE_ROWS for row in own})
        for site, pages in owned.items():
            assert all(count == 1 for count in pages.values()), "a page has two owners"
            assert sum(1 << page for page in pages) == ~self._free[site] & ((1 << self._pages) - 1), "a page leaked"
        assert self.rows_used == sum(map(self.rows_used_at, owned)), "rank rows are miscounted"


def rows_of(rank: int) -> int:
    """Rows that `rank` rank rows take, in whole pages."""
    return -(-rank // PAGE_ROWS) * PAGE_ROWS


def _find(free: int, rank: int) -> tuple[Rows, int] | None:
    """Rows for so many, and the pages that stay free; None when there are too few."""
    count = rows_of(rank) // PAGE_ROWS
    if free.bit_count() < count:
        return None
    runs = free  # bits where so many free pages begin
    for _ in range(count - 1):
        runs &= runs >> 1
    if runs:
        first = _lowest(runs)
        return tuple(range(first * PAGE_ROWS, first * PAGE_ROWS + rank)), free & ~(((1 << count) - 1) << first)
    rows: list[int] = []
    for _ in range(count):
        page = _lowest(free)
        rows += range(page * PAGE_ROWS, (page + 1) * PAGE_ROWS)
        free &= free - 1
    return tuple(rows[:rank]), free


def _lowest(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def _shared(rows: dict[str, Rows]) -> dict[str, Rows]:
    """With one tuple for all that are equal: sites whose free pages differ may have been given the same."""
    tuples: dict[Rows, Rows] = {}
    return {site: tuples.setdefault(own, own) for site, own in rows.items()}
