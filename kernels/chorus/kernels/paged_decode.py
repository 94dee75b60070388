"""Decode attention on a CPU without gathering: every page of the cache is a matrix of its own in one bmm.

    pages of the cache   [ p0 | p1 | p2 | p3 | .. ]      each belongs to one decode row, or to none of them
    scores, page by page [ G x B for each (page, key head) ]       bmm with the owner's queries
    scores, row by row   [R, H, slots * B]   -> softmax ->  back to pages  -> bmm with the pages' values  -> sum per row

Keys and values are read where they lie, so nothing is copied and a short row costs nothing for a long one beside it.
Where the rows' pages lie too far apart, or rows share pages, they are gathered page by page instead.

bmm rounds its result to the cache's type, which for bfloat16 scores is too coarse (4.6e-3 of the output's RMS; the
bound is 4e-3). A second product of the same operands, with the first subtracted before it is rounded, gives what
rounding took: scores then are good to 16 bits and the output to 2.9e-3, for a third more time.
"""

from collections.abc import Sequence

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
        self.rows = len(rows)
        self._rows_of_blocks: dict[int, tuple[Tensor, Tensor]] = {}
        self.slots = max(map(len, tables))
        owned = [(block, r, slot) for r, table in enumerate(tables) for slot, block in enumerate(table)]
        blocks = sorted(block for block, _, _ in owned)
        first, span = blocks[0], blocks[-1] + 1 - blocks[0]
        self.view: tuple[int, int] | None = None  # pages [first, first + span) of the cache, as they lie
        if len(set(blocks)) == len(blocks) >= DENSE * span:
            self.view = (first, span)
            owned = [(block - first, r, slot) for block, r, slot in owned]
        else:
            self.index = torch.tensor([block for block, _, _ in owned])
            span = len(owned)
            owned = [(page, r, slot) for page, (_, r, slot) in enumerate(owned)]
        self.span = span
        page, row, slot = torch.tensor(owned).T.contiguous()
        # Pages of nobody ask row 0's queries and add to a row that is thrown away.
        self.owner, self.slot_of_page = torch.zeros(span, dtype=torch.int64), torch.zeros(span, dtype=torch.int64)
        self.sum_into = torch.full((span,), self.rows)
        self.owner[page], self.sum_into[page], self.slot_of_page[page] = row, row, slot
        # What pads a row's slots is its own first page.
        self.page_of_slot = page[torch.searchsorted(row, torch.arange(self.rows))][:, None].repeat(1, self.slots)
        self.page_of_slot[row, slot] = page
        position = torch.arange(self.slots * block_size) + torch.tensor(starts)[:, None] * block_size  # [R, slots * B]
        context = torch.tensor([row.context for row in rows])[:, None]
        hidden = position >= context
        if window is not None:
            hidden |= position < context - window
        self.bias = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))[:, None]  # [R, 1, slots * B]

    def rows_of_blocks(self, heads: int) -> tuple[Tensor, Tensor]:
        """Where B scores of one page and head are found, as rows: by row, [R * H * slots], and by page, [span * H]."""
        if heads not in self._rows_of_blocks:
            head = torch.arange(heads)
            by_row = (self.page_of_slot[:, None, :] * heads + head[:, None]).flatten()
            by_page = ((self.owner[:, None] * heads + head) * self.slots + self.slot_of_page[:, None]).flatten()
            self._rows_of_blocks[heads] = by_row, by_page
        return self._rows_of_blocks[heads]

    def of(self, cache: Tensor) -> Tensor:
        """The pages' keys or values, [span * H_kv, B, D]; a view where that can be."""
        pages = cache.narrow(0, *self.view) if self.view is not None else cache.index_select(0, self.index)
        return pages.view(-1, *cache.shape[2:])


def decode_by_pages(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, pages: DecodePages, *, scale: float, soft_cap: float | None
) -> Tensor:
    """query [R, H, D], caches [blocks, H_kv, B, D]; returns [R, H, D]."""
    (rows, heads, dim), (_, kv_heads, block_size, _) = query.shape, k_cache.shape
    by_row, by_page = pages.rows_of_blocks(heads)
    asked = query.index_select(0, pages.owner).view(-1, heads // kv_heads, dim)  # [span * H_kv, G, D]
    scores = _product(asked, pages.of(k_cache).transpose(1, 2)).view(-1, block_size)  # [span * H, B]
    scores = scores.index_select(0, by_row).view(rows, heads, -1).mul_(scale)  # [R, H, slots * B]
    if soft_cap is not None:
        scores.div_(soft_cap).tanh_().mul_(soft_cap)
    weights = torch.softmax(scores.add_(pages.bias), dim=-1).to(query.dtype).view(-1, block_size)
    weights = weights.index_select(0, by_page).view(-1, heads // kv_heads, block_size)  # [span * H_kv, G, B]
    parts = torch.bmm(weights, pages.of(v_cache)).view(pages.span, heads * dim).float()
    total = torch.zeros(rows + 1, heads * dim).index_add_(0, pages.sum_into, parts)
    return total[:rows].to(query.dtype).view(rows, heads, dim)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, though bmm rounds to the operands' type."""
    product = torch.bmm(a, b)
    if product.dtype == torch.float32:
        return product
    rest = torch.baddbmm(product, a, b, beta=-1)
    return product.float().add_(rest)
