"""Decode attention on a CPU: a work item is one key head of one row, with all the query heads that read it.

    for each page        its keys, widened once, times G queries         -> scores [G, context], float32
    for each query       softmax, in place, but for its division
    for each page        weights times its values, widened once          -> sums [G, D], divided, rounded once

Keys and values are read where they lie, once; everything else stays in the first levels of the cache. In bfloat16
loops over pages are those of `page_tiles`: 16 rows, 16 heads of 64 over 4, 2 cores, from memory: of 128 tokens 88 us
instead of 144, of 1024 0.9 ms instead of 2.9; torch's bmm, page by page, took 560 us of 128. Without products of
bfloat16 32 rows of 8 heads of 32 over 4, one core, take 180 us of 128 tokens instead of 600.
"""
# numba compiles what it sees, whatever the types say.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import math
import sys
from array import array
from functools import cache

import numba
import numpy as np
import torch
from numba import carray
from torch import Tensor

from chorus.kernels.attention_plan import FEW_KEYS
from chorus.kernels.native.amx_tile import cpu_has_tiles
from chorus.kernels.native.numbers import HELD_AS, INLINE, float_of, narrow, pointer, take_ticket, wide
from chorus.kernels.native.page_tiles import KEYS, add_page, fetch, highest, powers, score_page, write_rows
from chorus.kernels.native.team import EDITION, Compiled
from chorus.kernels.native.vectors import LANES, cpu_has
from chorus.kernels.row_lists import RowLists

_FEW_KEYS_ALONE, _FEW_KEYS_WIDENED = 1 << 18, 1 << 16
_QUERIES_TOGETHER = 4
_SHORT = 1 << 14  # keys times key heads: 0.2 ms
AHEAD = 4  # pages that are fetched before they are read


class DecodeRows:
    """The new tokens of some sequences, R in all, each as a row of its own that sees its context; as the kernel reads
    them: int32, the longest context, R places in the batch, R contexts, where the pages of each begin, then pages.

    With room for `pages` the table can be written anew, in place.
    """

    def __init__(self, rows: RowLists, *, pages: int | None = None) -> None:
        self.count = len(rows.place)
        size = 1 + 3 * self.count + (len(rows.pages) if pages is None else pages)
        self._numbers = array("i", bytes(4 * size))
        self.table = torch.frombuffer(self._numbers, dtype=torch.int32)
        self.rewrite(rows)

    def rewrite(self, rows: RowLists) -> None:
        """Others of as many tokens.

        Raises:
            ValueError: not as many, or more pages than there is room for; nothing is written then.
        """
        self.keys = sum(rows.context)
        count, numbers = len(rows.place), [*rows.place, *rows.context, *rows.first_page, *rows.pages]
        if count != self.count or len(numbers) >= len(self._numbers):
            raise ValueError(
                f"rows: {count} tokens in tables of {1 + len(numbers)} numbers, "
                f"want {self.count} in {len(self._numbers)}"
            )
        self._numbers[: 1 + len(numbers)] = array("i", [max(rows.context), *numbers])


def decode_attention(
    out: Tensor,
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: DecodeRows,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    bias: Tensor | None = None,
) -> None:
    """Writes the rows' attention to `out`, [T, H, D], contiguous; the other rows of the batch are left alone.

    query [T, H, D]; caches [blocks, H_kv, B, D] of query's dtype, one of `HELD_AS`; bias [H, 2 m + 1], float32. That
    the rows' pages lie in the cache is the caller's to check: the kernel reads where they say. Heads' numbers lie side
    by side, and the caches' strides are equal.
    """
    heads, dim = query.shape[1:]
    kv_heads, block_size = k_cache.shape[1:3]
    kernel = _kernel(HELD_AS[query.dtype], dim, block_size)
    kernel(
        rows.count * kv_heads,
        *(out, query, k_cache, v_cache, rows.table, rows.count, kv_heads),
        *(query.stride(0), query.stride(1), *k_cache.stride()[:3]),
        *(scale, window or 0, soft_cap or 0.0, bias, 0 if bias is None else bias.shape[1] // 2, heads // kv_heads),
        is_long=rows.keys * kv_heads > _SHORT,
    )


def few_keys(query: Tensor, k_cache: Tensor, *, capped: bool) -> int:
    """Tokens of a chunk times the keys that each sees, up to which it is best computed as so many decodes.

    In tiles always, where the CPU multiplies bfloat16 and four query heads share a key head. 2 cores, ms so and with
    SDPA: 16 heads of 64 over 4, 64 tokens of 64 0.12, 0.33; 512 of 512 3.9, 10; 2048 of 2048 62, 72; 32 of 128 over 8,
    512 of 512 14, 31; 64 of 4096 32, 68. Over 8, 16 heads of 64: 2048 of 2048 99, 80; 8 of 64: 512 of 512 3.5, 4.3;
    2048 of 2048 51, 43. Where it has no such products, 16 heads of 64 over 4: 64 of 64 0.29, 0.69; 512 of 512 10, 14;
    1024 of 1024 38, 37; 16 of 128 over 8: 512 of 512 15, 27; 12 over 12: 256 of 256 3.4, 3.3.
    With AMX, 16 heads of 64 over 4: 64 of 64 0.16, 0.23; 128 of 128 0.43, 0.42; 512 of 512 4.6, 2.2; 8 of 64: 64 of 64
    0.13, 0.10.
    """
    in_tiles = _runs_in_tiles(HELD_AS[query.dtype], query.shape[2], k_cache.shape[2])
    if capped or not in_tiles or cpu_has_tiles():
        return FEW_KEYS
    together = query.shape[1] // k_cache.shape[1]
    multiplies = cpu_has("avx512bf16")
    if multiplies and together >= _QUERIES_TOGETHER:
        return sys.maxsize
    return _FEW_KEYS_ALONE if multiplies or together > 1 else _FEW_KEYS_WIDENED


@cache
def _runs_in_tiles(held: type, dim: int, block: int) -> bool:
    return held is HELD_AS[torch.bfloat16] and cpu_has("fma") and dim % 16 == 0 and block == KEYS


def prepare(dtype: torch.dtype, dim: int, block_size: int) -> None:
    """Compiles now what the first call would wait for."""
    _kernel(HELD_AS[dtype], dim, block_size)


@cache
def _kernel(held: type, dim: int, block: int) -> Compiled:
    """Dimensions and positions of a page are constants: their loops are unrolled. A server has one kernel."""
    edition, size = EDITION, np.dtype(held).itemsize
    tiled = _runs_in_tiles(held, dim, block)

    def decode_attention(arguments):
        a = carray(arguments, (20,))
        out_at, query_at, k_at, v_at, table_at, rows, kv_heads = a[2], a[3], a[4], a[5], a[6], a[7], a[8]
        query_row, query_head, page_stride = size * a[9], size * a[10], size * a[11]
        head_stride, stride, scale = size * a[12], size * a[13], float_of(numba.uint32(a[14]))
        window, cap, bias_at, furthest, group = a[15], float_of(numba.uint32(a[16])), a[17], a[18], a[19]
        places, contexts, firsts = carray(pointer(table_at + 4), (3, rows), np.int32)
        asked, sums = np.empty((group, dim), np.float32), np.empty((group, dim), np.float32)
        page, totals = np.empty((block, dim), np.float32), np.empty(group, np.float32)
        scores = np.empty((group, carray(pointer(table_at), (1,), np.int32)[0] + block + LANES), np.float32)
        bias = carray(pointer(bias_at), (kv_heads * group, 2 * furthest + 1 if bias_at else 0), np.float32)
        while edition == a[1]:
            item = take_ticket(arguments)
            if item >= rows * kv_heads:
                break
            row, head = rows - 1 - item // kv_heads, item % kv_heads  # a chunk's last tokens see most: those first
            first_page, pages, skipped, seen = _span(numba.int64(contexts[row]), window, block)
            table = carray(pointer(table_at + 4 * (1 + 3 * rows + firsts[row] + first_page)), (pages,), np.int32)
            keys, values = k_at + head * head_stride, v_at + head * head_stride
            own = query_at + places[row] * query_row + head * group * query_head
            _widen(asked, own, query_head, 0 if tiled else group, dim, held, scale)
            for p in range(min(AHEAD, pages)):
                fetch(_page_at(table, p, keys, values, page_stride), block * stride)
            for p in range(pages):
                at, ahead_at = _two_pages(table, p, keys, values, page_stride)
                if tiled:
                    score_page(dim, scores[:, p * block :], own, query_head, at, stride, scale, ahead_at)
                else:
                    fetch(ahead_at, block * stride)
                    _widen(page, at, stride, block, dim, held, np.float32(1))
                    _products(scores, p * block, asked, page)
            _weigh(totals, scores[:, skipped : skipped + seen], cap, bias[group * head : group * (head + 1)])
            sums[:] = np.float32(0)
            for p in range(pages):
                at, ahead_at = _two_pages(table, pages + p, keys, values, page_stride)
                low, high = max(skipped - p * block, 0), min(skipped + seen - p * block, block)
                if tiled:
                    weights = scores[:, p * block + low : p * block + high]
                    add_page(dim, sums, weights, at + low * stride, stride, ahead_at)
                else:
                    fetch(ahead_at, block * stride)
                    _widen(page, at, stride, high, dim, held, np.float32(1))
                    _add_values(sums, scores, p * block, page, low, high)
            into = out_at + size * (places[row] * kv_heads + head) * group * dim
            if tiled:
                write_rows(dim, into, sums, totals)
            else:
                _write(carray(pointer(into), (group, dim), held), sums, totals)

    return Compiled(decode_attention)


@numba.njit(**INLINE)
def _span(context, window, block):
    """Of a row's pages the first that it sees, and how many; of the first one's keys how many count for nothing; how
    many do in all."""
    begin = max(context - window, 0) if window > 0 else 0
    first_page = begin // block
    return first_page, (context + block - 1) // block - first_page, begin - first_page * block, context - begin


@numba.njit(**INLINE)
def _two_pages(table, i, keys, values, stride):
    """Where page i of a row lies, and the one to fetch meanwhile."""
    return _page_at(table, i, keys, values, stride), _page_at(table, i + AHEAD, keys, values, stride)


@numba.njit(**INLINE)
def _page_at(table, i, keys, values, stride):
    """Where page i of a row lies, keys' first, then values'; of what is past those the last one."""
    pages = len(table)
    if i < pages:
        return keys + stride * table[i]
    return values + stride * table[min(i - pages, pages - 1)]


@numba.njit(**INLINE)
def _widen(into, at, stride, count, dim, held, scale):
    """So many vectors of `dim` numbers as float32, times `scale`; the stride in bytes."""
    for j in range(count):
        numbers = carray(pointer(at + j * stride), (dim,), held)
        for d in range(dim):
            into[j, d] = wide(numbers[d]) * scale


@numba.njit(**INLINE)
def _products(scores, at, asked, keys):
    """scores [G, at to at + B] = asked [G, D] times keys [B, D]."""
    for g in range(asked.shape[0]):
        part = scores[g, at : at + keys.shape[0]]
        for j in range(keys.shape[0]):
            product = np.float32(0)
            for d in range(keys.shape[1]):
                product += asked[g, d] * keys[j, d]
            part[j] = product


@numba.njit(**INLINE)
def _weigh(totals, scores, cap, bias):
    """Scores [G, S] to weights, in place, and their sums: a softmax that is not divided yet. Before it the soft cap if
    over 0, and the bias [G, 2 m + 1], if it is not empty, of keys 0.. behind the query, the last number's own."""
    seen, furthest = scores.shape[1], bias.shape[1] // 2
    for g in range(len(totals)):
        part = scores[g]
        if cap > 0:
            for j in range(seen):
                part[j] = cap * np.float32(math.tanh(part[j] / cap))
        if bias.size:
            for j in range(seen):
                part[j] += bias[g, max(furthest + j + 1 - seen, 0)]
        totals[g] = powers(part, highest(part))


@numba.njit(**INLINE)
def _add_values(sums, weights, at, values, low, high):
    """sums [G, D] += weights [G, at to at + B] times values [B, D], of positions low to high."""
    block, dim = values.shape
    for g in range(sums.shape[0]):
        part = weights[g, at : at + block]
        if low == 0 and high == block:  # a length that the compiler knows: a sum stays in its register
            for d in range(dim):
                number = sums[g, d]
                for j in range(block):
                    number += part[j] * values[j, d]
                sums[g, d] = number
        else:
            for j in range(low, high):
                for d in range(dim):
                    sums[g, d] += part[j] * values[j, d]


@numba.njit(**INLINE)
def _write(out, sums, totals):
    """out [G, D] = sums over totals [G]."""
    for g in range(out.shape[0]):
        over = np.float32(1) / totals[g]
        for d in range(out.shape[1]):
            out[g, d] = narrow(sums[g, d] * over, out[g, d])
