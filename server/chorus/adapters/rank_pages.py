"""Who owns which rank rows of one site's pool. Bookkeeping only, no tensors.

Rows are handed out in pages of 8, neighbours where possible (a contiguous run is read as a view, a scattered one has to
be gathered). The last page of an adapter may be partly empty; nothing else is wasted.
"""

from collections import Counter
from collections.abc import Iterable

PAGE_ROWS = 8


class RankPages:
    """A pool of `rows` rank rows, a multiple of PAGE_ROWS."""

    def __init__(self, rows: int) -> None:
        if rows < PAGE_ROWS or rows % PAGE_ROWS:
            raise ValueError(f"rows: want a positive multiple of {PAGE_ROWS}, got {rows}")
        self._owned = [False] * (rows // PAGE_ROWS)
        self._free = len(self._owned)

    @property
    def rows_total(self) -> int:
        return len(self._owned) * PAGE_ROWS

    @property
    def rows_used(self) -> int:
        return (len(self._owned) - self._free) * PAGE_ROWS

    def fits(self, rank: int) -> bool:
        return pages_of(rank) <= self._free

    def allocate(self, rank: int) -> tuple[int, ...] | None:
        """Row indices for `rank` rows, in rank order; None when there are too few free pages."""
        count = pages_of(rank)
        if count > self._free:
            return None
        self._free -= count
        if (first := self._contiguous(count)) is not None:
            self._owned[first : first + count] = [True] * count
            return tuple(range(first * PAGE_ROWS, first * PAGE_ROWS + rank))
        pages = [i for i, owned in enumerate(self._owned) if not owned][:count]
        for page in pages:
            self._owned[page] = True
        return tuple(row for page in pages for row in range(page * PAGE_ROWS, (page + 1) * PAGE_ROWS))[:rank]

    def free(self, rows: tuple[int, ...]) -> None:
        """Gives back what `allocate` handed out."""
        for page in {row // PAGE_ROWS for row in rows}:
            if not self._owned[page]:
                raise ValueError(f"page {page} was not allocated")
            self._owned[page] = False
            self._free += 1

    def check_integrity(self, owners: Iterable[tuple[int, ...]]) -> None:
        """Raises AssertionError when a page belongs to nobody, or to two: `owners` are all that `allocate` gave."""
        pages = Counter(page for rows in owners for page in {row // PAGE_ROWS for row in rows})
        assert all(count == 1 for count in pages.values()), "a page has two owners"
        assert set(pages) == {page for page, owned in enumerate(self._owned) if owned}, "a page leaked"
        assert self._free == len(self._owned) - len(pages), "pages are miscounted"

    def _contiguous(self, count: int) -> int | None:
        """Where the first run of `count` free pages begins."""
        run = 0
        for page, owned in enumerate(self._owned):
            run = 0 if owned else run + 1
            if run == count:
                return page - count + 1
        return None


def pages_of(rank: int) -> int:
    """Pages that `rank` rows take."""
    return -(-rank // PAGE_ROWS)
