"""Decode attention on a CPU: a work item is one key head of one row, with all the query heads that read it.

    for each page        its keys, widened once, times G queries         -> scores [G, context], float32
    for each query       softmax, in place
    for each page        weights times its values, widened once          -> sums [G, D], rounded once

Keys and values are read where they lie, once; everything else stays in the first levels of the cache. 16 rows of 128
tokens, 16 heads of 64 over 4, take 131 us, where torch's bmm, page by page, took 560 (2 cores, bfloat16).
"""
# numba compiles what it sees, whatever the types say.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import math
from functools import cache

import numba
import numpy as np
import torch
from numba import carray
from torch import Tensor

from chorus.kernels.native.numbers import HELD_AS, INLINE, exp, float_of, narrow, pointer, prefetch, take_ticket, wide
from chorus.kernels.native.team import EDITION, Compiled
from chorus.kernels.row_arrays import RowArrays

AHEAD = 4  # pages that are fetched before they are read: from memory, 16 ms instead of 27 for 12 layers of 16 x 1024


class DecodeRows:
    """The new tokens of some sequences, R in all, each as a row of its own that sees its context; as the kernel reads
    them: int32, the longest context, R places in the batch, R contexts, where the pages of each begin, then pages.

    With room for `pages` the table can be written anew, in place.
    """

    def __init__(self, rows: RowArrays, *, causal: bool = True, pages: int | None = None) -> None:
        self._causal = causal
        self.count, numbers = len(rows.row), _numbers(rows, causal)
        self.table = torch.from_numpy(numbers)
        if pages is not None:
            self.table = torch.zeros(1 + 3 * self.count + pages, dtype=torch.int32)
            self.rewrite(rows)

    def rewrite(self, rows: RowArrays) -> None:
        """Others of as many tokens.

        Raises:
            ValueError: not as many, or more pages than there is room for; nothing is written then.
        """
        count, numbers = len(rows.row), _numbers(rows, self._causal)
        if count != self.count or len(numbers) > len(self.table):
            raise ValueError(
                f"rows: {count} tokens in tables of {len(numbers)} numbers, want {self.count} in {len(self.table)}"
            )
        self.table[: len(numbers)] = torch.from_numpy(numbers)


def _numbers(rows: RowArrays, causal: bool) -> np.ndarray:
    place = rows.start[rows.row] + rows.position - (rows.context - rows.tokens)[rows.row]
    context = rows.position + 1 if causal else rows.context[rows.row]
    parts = [rows.context.max()], place, context, rows.first_page[rows.row], rows.pages
    return np.concatenate(parts, dtype=np.int32, casting="unsafe")


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
    the rows' pages lie in the cache is the caller's to check: the kernel reads where they say.

    Raises:
        ValueError: the caches are strided differently, or a head's numbers lie apart.
    """
    if k_cache.stride() != v_cache.stride() or k_cache.stride(3) != 1 or query.stride(2) != 1:
        raise ValueError(
            "query, k_cache, v_cache: want heads' numbers side by side and equal strides of the caches, "
            f"got {query.stride()}, {k_cache.stride()} and {v_cache.stride()}"
        )
    heads, dim = query.shape[1:]
    kv_heads, block_size = k_cache.shape[1:3]
    kernel = _kernel(HELD_AS[query.dtype], dim, block_size)
    kernel(
        rows.count * kv_heads,
        *(out, query, k_cache, v_cache, rows.table, rows.count, kv_heads),
        *(query.stride(0), query.stride(1), *k_cache.stride()[:3]),
        *(scale, window or 0, soft_cap or 0.0, bias, 0 if bias is None else bias.shape[1] // 2, heads // kv_heads),
    )


def prepare(dtype: torch.dtype, dim: int, block_size: int) -> None:
    """Compiles now what the first call would wait for."""
    _kernel(HELD_AS[dtype], dim, block_size)


@cache
def _kernel(held: type, dim: int, block: int) -> Compiled:
    """Dimensions and positions of a page are constants: their loops are unrolled. A server has one kernel."""
    edition, size = EDITION, np.dtype(held).itemsize

    def decode_attention(arguments):
        a = carray(arguments, (20,))
        out_at, query_at, k_at, v_at, table_at, rows, kv_heads = a[2], a[3], a[4], a[5], a[6], a[7], a[8]
        query_row, query_head, page_stride, head_stride, stride = a[9], a[10], a[11], a[12], a[13]
        scale, window, cap = float_of(numba.uint32(a[14])), a[15], float_of(numba.uint32(a[16]))
        bias_at, furthest, group = a[17], a[18], a[19]
        longest = carray(pointer(table_at), (1,), np.int32)[0]
        places = carray(pointer(table_at + 4), (rows,), np.int32)
        contexts = carray(pointer(table_at + 4 + 4 * rows), (rows,), np.int32)
        firsts = carray(pointer(table_at + 4 + 8 * rows), (rows,), np.int32)
        asked = np.empty((group, dim), np.float32)
        page = np.empty((block, dim), np.float32)
        sums = np.empty((group, dim), np.float32)
        scores = np.empty((group, longest + block), np.float32)
        while edition == a[1]:
            item = take_ticket(arguments)
            if item >= rows * kv_heads:
                break
            row = rows - 1 - item // kv_heads  # a chunk's last tokens see most: those first
            head = item % kv_heads
            context = numba.int64(contexts[row])
            begin = max(context - window, 0) if window > 0 else 0
            first_page, end_page = begin // block, (context + block - 1) // block
            pages = end_page - first_page
            skipped, seen = begin - first_page * block, context - begin  # of the first page's keys; keys that count
            table = carray(pointer(table_at + 4 * (1 + 3 * rows + firsts[row] + first_page)), (pages,), np.int32)
            for g in range(group):
                at = places[row] * query_row + (head * group + g) * query_head
                _widen(asked[g], carray(pointer(query_at + size * at), (dim,), held), scale)
            for p in range(min(AHEAD, pages)):
                _fetch(k_at + size * (table[p] * page_stride + head * head_stride), block, size * stride)
            for p in range(pages):
                ahead = table[(p + AHEAD) % pages] * page_stride + head * head_stride
                _fetch((k_at if p + AHEAD < pages else v_at) + size * ahead, block, size * stride)
                at = table[p] * page_stride + head * head_stride
                for j in range(block):
                    _widen(page[j], carray(pointer(k_at + size * (at + j * stride)), (dim,), held), np.float32(1))
                _products(scores, p * block, asked, page)
            for g in range(group):
                bias_row = bias_at + 4 * (head * group + g) * (2 * furthest + 1)
                by_distance = carray(pointer(bias_row), (furthest + 1 if bias_at else 0,), np.float32)
                _weigh(scores[g, skipped : skipped + seen], cap, by_distance)
            sums[:] = np.float32(0)
            for p in range(pages):
                if p + AHEAD < pages:
                    _fetch(v_at + size * (table[p + AHEAD] * page_stride + head * head_stride), block, size * stride)
                at = table[p] * page_stride + head * head_stride
                low, high = max(skipped - p * block, 0), min(skipped + seen - p * block, block)
                for j in range(high):
                    _widen(page[j], carray(pointer(v_at + size * (at + j * stride)), (dim,), held), np.float32(1))
                _add_values(sums, scores, p * block, page, low, high)
            for g in range(group):
                at = (places[row] * kv_heads + head) * group + g
                result = carray(pointer(out_at + size * at * dim), (dim,), held)
                for d in range(dim):
                    result[d] = narrow(sums[g, d], result[d])

    return Compiled(decode_attention)


@numba.njit(**INLINE)
def _fetch(at, tokens, token_bytes):
    """A page's keys or values of one head, into the second level of the cache."""
    for j in range(0, tokens * token_bytes, 64):
        prefetch(at + j)


@numba.njit(**INLINE)
def _widen(into, numbers, scale):
    for d in range(len(into)):
        into[d] = wide(numbers[d]) * scale


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
def _weigh(scores, cap, by_distance):
    """The softmax of one query's scores, in place; before it the soft cap if over 0, and the bias of keys 0.. behind
    the query, the last number's own."""
    seen, furthest = len(scores), len(by_distance) - 1
    if cap > 0:
        for j in range(seen):
            scores[j] = cap * np.float32(math.tanh(scores[j] / cap))
    if furthest >= 0:
        for j in range(seen):
            scores[j] += by_distance[max(furthest + j + 1 - seen, 0)]
    highest, total = np.float32(-np.inf), np.float32(0)
    for j in range(seen):
        highest = max(highest, scores[j])
    for j in range(seen):
        weight = exp(scores[j] - highest)
        scores[j] = weight
        total += weight
    over = np.float32(1) / total
    for j in range(seen):
        scores[j] *= over


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
