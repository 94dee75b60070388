"""Attention of prompts on a CPU with products of bfloat16: a work item is a key head of some tokens of one sequence,
with all the query heads that read it.

    each 64 keys             keys and values laid as a linear's weights are
        each 8 queries       scores = queries times keys            `dot_tile`
                             weights = e^(scores - the highest so far), rounded; sums scaled if that has risen
                             sums += weights times values           `dot_tile`
    sums over the weights' totals, rounded once

Token by token, as `decode_attention` has it, keys are read again for each, and a product of one query with one key ends
in a sum over lanes. Here both products run at the rate of a linear's, and of a chunk's time half is e^x.
"""
# numba compiles what it sees, whatever the types say.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from array import array
from collections.abc import Sequence
from functools import cache

import numba
import numpy as np
import torch
from numba import carray
from torch import Tensor

from chorus.kernels.native.amx_tile import cpu_has_tiles
from chorus.kernels.native.dot_tile import COLUMNS, PANEL, ROWS, tile, tile_anew
from chorus.kernels.native.numbers import INLINE, exp, float_of, lines, pointer, take_ticket
from chorus.kernels.native.page_tiles import KEYS, LOG2_E, fetch, highest_seen, lay_keys, lay_values, weigh_seen, write
from chorus.kernels.native.team import EDITION, Compiled
from chorus.kernels.native.vectors import cpu_has
from chorus.kernels.types import AttentionRow

_QUERIES = 256
"""Of an item at most: its sums stay in the second level of the cache, and keys are laid once for all of them."""
_NUMBERS = 5  # of an item in the table
_LEAST_QUERIES, _LEAST_TOKENS = 8, 4
_SHORT = 1 << 14  # tokens times keys times key heads: 0.2 ms


class PromptRows:
    """The new tokens of some sequences in parts, for `group` query heads to a key head; as the kernel reads them.

    int32: for each part its first token's place in the batch, how many tokens, the first one's position, where the
    sequence's pages begin, and how many keys there are; then pages.
    """

    def __init__(self, rows: Sequence[AttentionRow], block_size: int, group: int, *, causal: bool) -> None:
        most = max(_QUERIES // group, 1)
        parts, pages, self.keys = array("i"), array("i"), 0
        for row in rows:
            first = row.context - (row.end - row.start)
            for start in range(row.start, row.end, most):
                tokens, position = min(most, row.end - start), first + start - row.start
                seen = position + tokens if causal else row.context
                parts.extend((start, tokens, position if causal else row.context, len(pages), seen))
                self.keys += tokens * seen
            pages.extend(row.used(block_size))
        self.count = len(parts) // _NUMBERS
        self.table = torch.frombuffer(parts + pages, dtype=torch.int32)


def prompt_attention(
    out: Tensor,
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: PromptRows,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> None:
    """Writes the rows' attention to `out`, [T, H, D], contiguous; the other rows of the batch are left alone.

    query [T, H, D]; caches [blocks, H_kv, 16, D]; bfloat16, D a multiple of 32, a head's numbers side by side, equal
    strides of the caches, which hold no infinity and no NaN. That the rows' pages lie in them is the caller's to check.
    """
    heads, dim = query.shape[1:]
    kv_heads = k_cache.shape[1]
    _kernel(dim)(
        rows.count * kv_heads,
        *(out, query, k_cache, v_cache, rows.table, rows.count, kv_heads, heads // kv_heads),
        *(query.stride(0), query.stride(1), *k_cache.stride()[:3]),
        *(scale, window or 0, soft_cap or 0.0),
        is_long=rows.keys * kv_heads > _SHORT,
    )


def tiled_from(query: Tensor, k_cache: Tensor) -> int | None:
    """How many tokens a chunk has at least that is best computed here; None where the kernel does not run.

    2 cores of Zen 5, ms so and token by token: 16 heads of 64 over 4, 4 chunks of 4 of 2048 tokens 0.44, 0.48; of 16
    of 2048 1.1, 1.9; 16 of 64 of 64 0.53, 0.87; 2048 of 2048 14, 30. 16 heads over 16, 4 chunks of 4 of 2048 2.5, 2.1;
    of 8 of 2048 2.5, 3.3; 1024 of 1024 4.0, 19. With AMX SDPA is faster than token by token, and this was not measured.
    """
    if not _runs(query.dtype, query.shape[2], k_cache.shape[2]):
        return None
    return max(-(-_LEAST_QUERIES * k_cache.shape[1] // query.shape[1]), _LEAST_TOKENS)


def prepare(dtype: torch.dtype, dim: int, block_size: int) -> None:
    """Compiles now what the first call would wait for."""
    if _runs(dtype, dim, block_size):
        _kernel(dim)


def _runs(dtype: torch.dtype, dim: int, block_size: int) -> bool:
    fits = dtype == torch.bfloat16 and dim % COLUMNS == 0 and block_size == KEYS
    return fits and cpu_has("avx512bf16") and not cpu_has_tiles()


@cache
def _kernel(dim: int) -> Compiled:
    edition, panels, size = EDITION, -(-dim // PANEL), 2 * dim

    def prompt_attention(arguments):
        a = carray(arguments, (18,))
        out_at, query_at, k_at, v_at, table_at, parts, kv_heads, group = a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9]
        query_row, query_head, page_stride, head_stride, stride = 2 * a[10], 2 * a[11], 2 * a[12], 2 * a[13], 2 * a[14]
        scale, window, cap = float_of(numba.uint32(a[15])), a[16], float_of(numba.uint32(a[17]))
        table = carray(pointer(table_at), (parts, _NUMBERS), np.int32)
        most = max(_QUERIES, group) + ROWS
        queries = lines(most * dim // 2).view(np.uint16).reshape((most, dim))
        keys = lines(dim // 2 * PANEL).view(np.int32).reshape((dim // 2, PANEL))
        values = lines(panels * PANEL // 2 * PANEL).view(np.int32).reshape((panels, PANEL // 2, PANEL))
        values[:] = 0  # where a page has not been, no weight is; but 0 times NaN is NaN
        scores = lines(ROWS * PANEL).reshape((ROWS, PANEL))
        weights = lines(ROWS * PANEL // 2).view(np.uint16).reshape((ROWS, PANEL))
        sums = lines(panels * most * PANEL).reshape((panels, most, PANEL))
        highs, totals, positions = np.empty(most, np.float32), np.empty(most, np.float32), np.empty(most, np.int64)
        while edition == a[1]:
            item = take_ticket(arguments)
            if item >= parts * kv_heads:
                break
            head, part = item % kv_heads, parts - 1 - item // kv_heads  # a chunk's last tokens see most: those first
            place, tokens, position, first_page, seen = table[part]
            count = tokens * group
            pages = _pages(table_at + 4 * (_NUMBERS * parts + first_page), seen)
            for row in range(count):
                token, g = row // group, head * group + row % group
                positions[row], highs[row], totals[row] = position + token, np.float32(-np.inf), np.float32(0)
                _copy(dim, queries.ctypes.data + size * row, query_at + (place + token) * query_row + g * query_head)
            sums[:, : count + ROWS] = np.float32(0)
            for low in range(_begin(position, window), seen, PANEL):
                _lay(dim, keys, values, pages, low, k_at, v_at, head * head_stride, page_stride, stride)
                for row in range(0, count, ROWS):
                    asked, last = queries.ctypes.data + size * row, min(row + ROWS, count) - 1
                    end = min(min(positions[last] + 1, seen) - low, PANEL)
                    if end <= 0 or (window > 0 and positions[row] + 1 - window >= low + PANEL):
                        continue
                    for column in range(0, end, COLUMNS):
                        at = 4 * column
                        tile_anew(
                            asked, size, last - row, keys.ctypes.data + at, dim // 2, scores.ctypes.data + at, asked, 0
                        )
                    for r in range(row, last + 1):
                        bottom, top = _ends(positions[r] + 1, window, low, seen)
                        scores_at = scores.ctypes.data + 4 * PANEL * (r - row)
                        weights_at = weights.ctypes.data + 2 * PANEL * (r - row)
                        high, total = _weigh(scores_at, weights_at, bottom, top, scale, cap, highs[r])
                        if high > highs[r]:
                            fall = exp((highs[r] - high) * (np.float32(1) if cap > 0 else scale))
                            highs[r], totals[r] = high, totals[r] * fall
                            _scale(sums.ctypes.data + 4 * PANEL * r, panels, PANEL * most, fall)
                        totals[r] += total
                    for d in range(0, dim, COLUMNS):
                        panel, column = d // PANEL, d % PANEL
                        values_at = values.ctypes.data + 4 * (PANEL // 2 * PANEL * panel + column)
                        sums_at = sums.ctypes.data + 4 * (PANEL * (most * panel + row) + column)
                        tile(weights.ctypes.data, 2 * PANEL, last - row, values_at, (end + 1) // 2, sums_at, asked, 0)
            for row in range(count):
                out = ((place + row // group) * kv_heads + head) * group + row % group
                _write(dim, out_at + size * out, sums, row, np.float32(1) / totals[row])

    return Compiled(prompt_attention)


@numba.njit(**INLINE)
def _pages(at, seen):
    return carray(pointer(at), ((seen + KEYS - 1) // KEYS,), np.int32)


@numba.njit(**INLINE)
def _begin(position, window):
    """The first key to look at, of a part whose first token has this position: 64 are looked at together."""
    return max(position + 1 - window, 0) // PANEL * PANEL if window > 0 else 0


@numba.njit(**INLINE)
def _ends(own, window, low, seen):
    """Of 64 keys from number `low` on the first that a token sees and the one after its last; its own is the last."""
    return max(own - window - low, 0) if window > 0 else 0, min(own, seen) - low


@numba.njit(**INLINE)
def _copy(dim, into_at, at):
    into, numbers = carray(pointer(into_at), (dim,), np.uint16), carray(pointer(at), (dim,), np.uint16)
    for d in range(dim):
        into[d] = numbers[d]


@numba.njit(**INLINE)
def _lay(dim, keys, values, pages, low, k_at, v_at, head_at, page_stride, stride):
    """Keys from number `low` on, 64 or as many as there are, and their values. The next ones are fetched meanwhile."""
    together = PANEL // KEYS
    for i in range(min(together, len(pages) - low // KEYS)):
        page = page_stride * pages[low // KEYS + i] + head_at
        lay_keys(dim, keys.ctypes.data + 4 * KEYS * i, k_at + page, stride)
        lay_values(dim, values[:, KEYS // 2 * i :], v_at + page, stride)
        if low // KEYS + i + together < len(pages):
            page = page_stride * pages[low // KEYS + i + together] + head_at
            fetch(k_at + page, KEYS * stride)
            fetch(v_at + page, KEYS * stride)


# Addresses, not arrays: who is handed an array is counted, for all threads to see, which costs as much as the weights.
@numba.njit(**INLINE)
def _weigh(scores_at, weights_at, bottom, top, scale, cap, highest):
    """Of a query's scores of 64 keys, of which it sees numbers [bottom, top), the weights under the highest score so
    far; returns that one, `highest` being what it was before, and their sum."""
    factor = (np.float32(1) if cap > 0 else scale) * np.float32(LOG2_E)
    if cap > 0:
        scores = carray(pointer(scores_at), (PANEL,), np.float32)
        for j in range(PANEL):  # tanh x is 1 - 2 / (e^2x + 1)
            power = exp(scores[j] * (np.float32(2) * scale / cap))
            scores[j] = cap - np.float32(2) * cap / (power + np.float32(1))
    if bottom <= 0 and top >= PANEL:
        high = max(highest, highest_seen(PANEL, True, scores_at, bottom, top))
        total = weigh_seen(PANEL, True, weights_at, scores_at, factor, high, bottom, top)
    else:
        high = max(highest, highest_seen(PANEL, False, scores_at, bottom, top))
        total = weigh_seen(PANEL, False, weights_at, scores_at, factor, high, bottom, top)
    return high, total


@numba.njit(**INLINE)
def _scale(at, panels, apart, factor):
    """What is summed up of a query, times a factor; its panels' sums lie `apart` numbers from each other."""
    for panel in range(panels):
        sums = carray(pointer(at + 4 * apart * panel), (PANEL,), np.float32)
        for d in range(PANEL):
            sums[d] *= factor


@numba.njit(**INLINE)
def _write(dim, at, sums, row, factor):
    for panel in range(dim // PANEL):
        write(PANEL, at + 2 * PANEL * panel, sums[panel, row].ctypes.data, factor)
    if dim % PANEL:
        write(COLUMNS, at + 2 * PANEL * (dim // PANEL), sums[dim // PANEL, row].ctypes.data, factor)
