"""A batch's attention rows as lists of numbers, read off the rows once: what their slots and tables are made of.

Lists, since a batch has few rows: where a step has emptied the caches numpy's first calls take 10 to 30 us each, and a
row of 10 pages here 2.
"""

from collections.abc import Iterator, Sequence
from itertools import repeat

from chorus.kernels.types import AttentionRow


class RowLists:
    """Of rows with T new tokens: `pages`, the blocks that hold their contexts, one row's after the other's; for
    each new token [T] its `place` in the batch, the `context` that it sees, and where in `pages` its row's begin,
    `first_page`. `slots` [T] are the new tokens' places in the cache, counted in tokens; none without `causal`.
    """

    def __init__(self, rows: Sequence[AttentionRow], block_size: int, causal: bool) -> None:
        self.block_size, self.causal = block_size, causal
        self.pages: list[int] = []
        self.place: list[int] = []
        self.context: list[int] = []
        self.first_page: list[int] = []
        self.slots: list[int] = []
        for row in rows:
            new = row.end - row.start
            if causal and new == 1:  # a decode, as most rows are: this takes a third of what is below
                position = row.context - 1
                self.place.append(row.start)
                self.context.append(row.context)
                self.first_page.append(len(self.pages))
                self.slots.append(row.blocks[position // block_size] * block_size + position % block_size)
                self.pages += row.used(block_size)
                continue
            self.place += range(row.start, row.end)
            self.context += range(row.context - new + 1, row.context + 1) if causal else repeat(row.context, new)
            self.first_page += repeat(len(self.pages), new)
            self.pages += row.used(block_size)
            if causal:
                self.slots += _slots(row, row.context - new, block_size)

    @property
    def highest_block(self) -> int:
        """-1 of no rows."""
        return max(self.pages, default=-1)


def _slots(row: AttentionRow, first: int, block_size: int) -> Iterator[int]:
    """Of positions `first` and after."""
    for page in range(first // block_size, -(-row.context // block_size)):
        to_slot = (row.blocks[page] - page) * block_size
        begin, end = page * block_size, (page + 1) * block_size
        yield from range(to_slot + max(begin, first), to_slot + min(end, row.context))
