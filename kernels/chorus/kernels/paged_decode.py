"""Decode attention on a CPU without gathering: every page of the cache is a matrix of its own in one bmm.

    pages of the cache   [ p0 | p1 | p2 | p3 | .. ]      each belongs to one decode row, or to none of them
    scores, page by page [ G x B for each (page, key head) ]       bmm with the owner's queries
    scores, row by row   [R, H, slots * B]   -> softmax ->  back to pages  -> bmm with the pages' values  -> sum per row

Keys and values are read where they lie, so nothing is copied and a short row costs nothing for a long one beside it.
Where the rows' pages lie too far apart, or rows share pages, they are gathered page by page instead.

bmm rounds its result to the cache's type, which for bfloat16 scores is too coarse (4.6e-3 of the output's RMS; the
bound is 4e-3). A second product of the same operands, with the first subtracted before it is rounded, gives what
rounding took: scores then are good to 16 bits and the output to 2.9e-3, for a third more time.

At 16 rows of 64 tokens a third of the time is the calls themselves, so there are few of them: indices are made once a
batch, and embedding_bag adds a row's pages (8 us, where turning them into float32 and index_add_ took 65).
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from chorus.kernels.types import AttentionRow

# Share of the pages between the rows' first and last that has to be theirs; the others are computed for nothing.
DENSE = 0.6


class DecodePages:
    """Which pages R decode rows attend to, and where each page's scores stand in its row. Made once a batch.

    `rows` have one new token each. With `window`, pages that lie wholly before it are left out.
    """

    def __init__(self, rows: Sequence[AttentionRow], block_size: int, window: int | None) -> None:
        starts = [0 if window is None else max(row.context - window, 0) // block_size for row in rows]
        tables = [row.blocks[start : -(-row.context // block_size)] for row, start in zip(rows, starts, strict=True)]
        blocks = [block for table in tables for block in table]
        first, end = min(blocks), max(blocks) + 1
        self.view: tuple[int, int] | None = None  # pages [first, first + span) of the cache, as they lie
        if len(set(blocks)) == len(blocks) >= DENSE * (end - first):
            self.view = first, end - first
            pages, self.span = [block - first for block in blocks], end - first
        else:
            self._index = torch.tensor(blocks)
            pages, self.span = list(range(len(blocks))), len(blocks)
        self.slots = max(map(len, tables))
        first_page_of_row = [0, *accumulate(map(len, tables))][:-1]
        # Pages of nobody ask the first row's queries, and nothing is done with what comes out.
        queries, slot_of_page, owner = [rows[0].start] * self.span, [0] * self.span, [0] * self.span
        page_of_slot: list[int] = []
        for r, (row, at, table) in enumerate(zip(rows, first_page_of_row, tables, strict=True)):
            mine = pages[at : at + len(table)]
            for slot, page in enumerate(mine):
                queries[page], owner[page], slot_of_page[page] = row.start, r, slot
            page_of_slot += mine + mine[:1] * (self.slots - len(mine))  # what pads is the row's own first page
        self.queries, self._owner, self._slot_of_page, self._page_of_slot, self.pages, self.first_page_of_row = map(
            torch.tensor, (queries, owner, slot_of_page, page_of_slot, pages, first_page_of_row)
        )
        self._rows_of_blocks: dict[int, tuple[Tensor, Tensor]] = {}
        position = torch.arange(self.slots * block_size) + torch.tensor(starts)[:, None] * block_size  # [R, slots * B]
        context = torch.tensor([row.context for row in rows])[:, None]
        hidden = position >= context
        if window is not None:
            hidden |= position < context - window
        self._distance = position + 1 - context  # [R, slots * B], of a key after the row's query
        self.hide = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))[:, None]  # [R, 1, slots * B]

    def rows_of_blocks(self, heads: int) -> tuple[Tensor, Tensor]:
        """Where B scores of one page and head are found, as rows: by row, [R * H * slots], and by page, [span * H]."""
        if heads not in self._rows_of_blocks:
            head = torch.arange(heads)
            by_row = (self._page_of_slot.view(-1, 1, self.slots) * heads + head[:, None]).flatten()
            by_page = ((self._owner[:, None] * heads + head) * self.slots + self._slot_of_page[:, None]).flatten()
            self._rows_of_blocks[heads] = by_row, by_page
        return self._rows_of_blocks[heads]

    def added(self, bias: Tensor | None) -> Tensor:
        """What scores get added: -inf where a key is hidden, and the bias by distance, [H, 2 m + 1]; [R, H | 1, ..]."""
        if bias is None:
            return self.hide
        furthest = bias.shape[1] // 2
        index = self._distance.clamp(-furthest, furthest) + furthest
        by_head = bias.index_select(1, index.flatten()).view(len(bias), *index.shape)
        return self.hide + by_head.transpose(0, 1)

    def of(self, cache: Tensor) -> Tensor:
        """The pages' keys or values, [span * H_kv, B, D]; a view where that can be."""
        pages = cache.narrow(0, *self.view) if self.view is not None else cache.index_select(0, self._index)
        return pages.view(-1, *cache.shape[2:])


def decode_by_pages(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    pages: DecodePages,
    *,
    scale: float,
    soft_cap: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """query [T, H, D] of the whole batch, caches [blocks, H_kv, B, D]; returns the decode rows' [R, H, D]."""
    (_, heads, dim), (_, kv_heads, block_size, _) = query.shape, k_cache.shape
    by_row, by_page = pages.rows_of_blocks(heads)
    asked = query.index_select(0, pages.queries).view(-1, heads // kv_heads, dim)  # [span * H_kv, G, D]
    scores = _scores(asked, pages.of(k_cache).transpose(1, 2), by_row)  # [R * H * slots, B]
    scores = scores.view(-1, heads, pages.slots * block_size)
    if soft_cap is None:
        scores = torch.add(pages.added(bias), scores, alpha=scale)
    else:
        scores.mul_(scale / soft_cap).tanh_().mul_(soft_cap).add_(pages.added(bias))
    weights = torch.softmax(scores, dim=-1).to(query.dtype).view(-1, block_size)
    weights = weights.index_select(0, by_page).view(-1, heads // kv_heads, block_size)  # [span * H_kv, G, B]
    parts = torch.bmm(weights, pages.of(v_cache)).view(pages.span, heads * dim)
    return torch.embedding_bag(parts, pages.pages, pages.first_page_of_row)[0].view(-1, heads, dim)


def _scores(asked: Tensor, keys: Tensor, by_row: Tensor) -> Tensor:
    """asked keys, rows of B of them put in the order `by_row`; in float32 at least, though bmm rounds to its inputs."""
    product = torch.bmm(asked, keys)
    scores = product.view(-1, keys.shape[2]).index_select(0, by_row)
    if scores.dtype.itemsize >= 4:
        return scores
    rest = torch.baddbmm(product, asked, keys, beta=-1)
    return scores.float().add_(rest.view(-1, keys.shape[2]).index_select(0, by_row))
