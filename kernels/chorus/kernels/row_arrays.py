"""A batch's attention rows as arrays, read off the rows once: what their slots, tables and checks are made of."""

from collections.abc import Sequence
from itertools import chain

import numpy as np

from chorus.kernels.types import AttentionRow


class RowArrays:
    """Of S rows with T new tokens, int64: `start`, `end`, `context` [S]; `pages`, the blocks that hold their contexts,
    one row's after the other's, which begin at `first_page` [S]; of each new token [T] `row`, and its `position`.
    """

    def __init__(self, rows: Sequence[AttentionRow], block_size: int) -> None:
        used = [row.used(block_size) for row in rows]
        self.block_size = block_size
        numbers = np.fromiter(chain.from_iterable((r.start, r.end, r.context) for r in rows), np.int64, 3 * len(rows))
        self.start, self.end, self.context = numbers.reshape(-1, 3).T
        self._counts = np.fromiter(map(len, used), np.int64, len(used))
        self.pages = np.fromiter(chain.from_iterable(used), np.int64)
        self.first_page = np.cumsum(self._counts) - self._counts
        self.tokens = np.maximum(self.end - self.start, 0)
        self.row = np.repeat(np.arange(len(rows)), self.tokens)
        behind = np.repeat(self.context - np.cumsum(self.tokens), self.tokens)
        self.position = behind + np.arange(len(self.row))

    def are_sound(self, *, causal: bool) -> bool:
        """Rows in order without gaps, contexts that hold their tokens, tables that hold their contexts."""
        before = np.concatenate(([0], self.end[:-1]))
        least = self.tokens if causal else 1
        return bool(
            (self.start == before).all()
            and (self.end > self.start).all()
            and (self.context >= least).all()
            and (self._counts * self.block_size >= self.context).all()
            and (self.pages >= 0).all()
        )

    @property
    def highest_block(self) -> int:
        """-1 of no rows."""
        return int(self.pages.max(initial=-1))

    def slots(self) -> np.ndarray:
        """Of each new token its place in the cache, counted in tokens."""
        pages: np.ndarray = self.pages[self.first_page[self.row] + self.position // self.block_size]
        return pages * self.block_size + self.position % self.block_size
