"""`low_rank` on a CPU: a work item is up to `ROWS` rows of one segment, at one site.

    x's rows, widened once                                                 -> xs [rows, K], float32
    for each 4 rank rows of A    products with xs                          -> middle [rows, ranks]
                                 scale, bias, activation, in place
    for each TILE of N           y's rows, widened                         -> sums [rows, TILE]
        for each 4 rank rows of B    middle times them, added to sums
                                 rounded once                              -> y

A and B are read where they lie, once for all rows of an item; the 4 rank rows that come next are fetched meanwhile.
In bfloat16, on any CPU with fused products, loops are those of `rank_tiles`: 8 segments of 64 rows
take 12 ms instead of 55 at the 84 linears of a 144M Llama, and 75 with torch's GEMMs.
"""
# numba compiles what it sees, whatever the types say.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numba
import numpy as np
import torch
from numba import carray
from torch import Tensor

from chorus.kernels.native.numbers import HELD_AS, INLINE, OPTIONS, exp, narrow, pointer, prefetch, take_ticket, wide
from chorus.kernels.native.rank_tiles import (
    EXPAND_COLUMNS,
    EXPAND_ROWS,
    ROW_COLUMNS,
    SHRINK_RANKS,
    SHRINK_ROWS,
    SHRINK_STEP,
    expand_row,
    expand_tile,
    narrow_row,
    shrink_row,
    shrink_tile,
    widen_row,
)
from chorus.kernels.native.team import EDITION, Compiled
from chorus.kernels.native.vectors import cpu_has
from chorus.kernels.types import Activation, LowRankSegment, RankPool

ROWS = 8
TILE = 1024
RANKS = 4  # as many rank rows at once as the code below names
_HEAD, _SITE = 6, 8  # numbers in the arguments before the sites, and of a site
_FIRST, _ITEM = 2, 5  # numbers in a table before the items, and of an item

NONE, RELU, GELU, GELU_TANH, SILU = (int(Activation[name]) for name in ("NONE", "RELU", "GELU", "GELU_TANH", "SILU"))


class ShortSegments:
    """Segments as the kernel reads them, cut into items: int32, how many items and the most pool rows of one; five
    numbers an item (first row, rows, where its pool rows begin in the list after all items, how many, activation);
    pool rows."""

    def __init__(self, items: int, table: Tensor) -> None:
        self.items, self.table = items, table

    @classmethod
    def of(cls, segments: Sequence[LowRankSegment]) -> "ShortSegments":
        items: list[int] = []
        pool_rows: list[int] = []
        for s in segments:
            for start in range(s.start, s.end, ROWS):
                items += start, min(ROWS, s.end - start), len(pool_rows), len(s.pool_rows), s.activation
            pool_rows += s.pool_rows
        count, most = len(items) // _ITEM, max((len(s.pool_rows) for s in segments), default=0)
        return cls(count, torch.tensor([count, most, *items, *pool_rows], dtype=torch.int32))

    @staticmethod
    def most_numbers(rows: int, rank: int) -> int:
        """In a table of up to so many rows, over adapters of up to that rank."""
        return _FIRST + rows * (_ITEM + rank)


class NativeSite(NamedTuple):
    """What is to be added to y [T, N] at one site."""

    y: Tensor
    pool: RankPool
    segments: ShortSegments
    mid_bias: Tensor | None = None


def low_rank(x: Tensor, sites: Sequence[NativeSite]) -> None:
    """Adds the segments' deltas to y at sites that read the same x, [T, K] or token ids [T].

    All in one of the dtypes `HELD_AS`, checked by the caller: the kernel reads and writes where the segments say.
    """
    numbers: list[Tensor | int | None] = []
    items = 0
    for y, (a, b, mid_scale), segments, mid_bias in sites:
        numbers += [y, y.stride(0), y.shape[1], a, b, mid_scale, mid_bias, segments.table]
        items += segments.items
    a = sites[0].pool.a
    _kernel(a.dtype)(items, x, int(x.dim() == 1), a.shape[1], len(sites), *numbers)


@cache
def runs_in_tiles(dtype: torch.dtype) -> bool:
    """Whether its loops are those of `rank_tiles`."""
    return dtype == torch.bfloat16 and cpu_has("fma")


def prepare(dtype: torch.dtype) -> None:
    """Compiles now what the first call would wait for."""
    _kernel(dtype)


@cache
def _kernel(dtype: torch.dtype) -> Compiled:
    held, tiled = HELD_AS[dtype], runs_in_tiles(dtype)
    edition, size = EDITION, np.dtype(held).itemsize

    def low_rank(arguments):
        head = carray(arguments, (_HEAD,))
        x_at, by_id, k, sites = head[2], head[3], head[4], head[5]
        words = carray(arguments, (_HEAD + _SITE * sites,))
        items = most_ranks = 0
        for site in range(sites):
            about = carray(pointer(words[_HEAD + _SITE * site + 7]), (2,), np.int32)
            items, most_ranks = items + about[0], max(most_ranks, numba.int64(about[1]))
        xs = np.empty((ROWS, 1 if by_id else k), np.float32)
        middle = np.empty((ROWS, most_ranks + RANKS), np.float32)
        weights = np.empty((RANKS, TILE), np.float32)
        sums = np.empty((ROWS, TILE), np.float32)
        addresses, tile = np.empty(most_ranks + RANKS, np.int64), np.empty((SHRINK_ROWS, SHRINK_RANKS), np.float32)
        while edition == head[1]:
            item, at = take_ticket(arguments), _HEAD
            if item >= items:
                break
            own_items = carray(pointer(words[at + 7]), (1,), np.int32)[0]
            while item >= own_items:
                item -= own_items
                at += _SITE
                own_items = carray(pointer(words[at + 7]), (1,), np.int32)[0]
            y_at, y_stride, n, a_at, b_at = words[at], words[at + 1], words[at + 2], words[at + 3], words[at + 4]
            scale_at, bias_at, table_at = words[at + 5], words[at + 6], words[at + 7]
            about = carray(pointer(table_at + 4 * (_FIRST + _ITEM * item)), (_ITEM,), np.int32)
            start, rows, ranks = numba.int64(about[0]), numba.int64(about[1]), numba.int64(about[3])
            own = carray(pointer(table_at + 4 * (_FIRST + _ITEM * own_items + about[2])), (ranks,), np.int32)
            if tiled and not by_id:
                _shrink_tiled(middle, tile, addresses, x_at + size * start * k, a_at, b_at, own, rows, k, n)
            elif by_id:
                _look_up(middle, x_at, a_at, held, size, own, start, rows, k)
            else:
                for g in range(rows):
                    _widen(xs[g], _numbers(x_at, held, size, (start + g) * k, k))
                _shrink(middle, xs, weights, a_at, b_at, held, size, own, rows, k, n)
            _between(middle, rows, own, scale_at, bias_at, about[4])
            if tiled and rows == 1 and n % ROW_COLUMNS == 0 and ranks % SHRINK_RANKS == 0:
                _expand_row(sums[0], middle[0], addresses, y_at + size * start * y_stride, b_at, own, n)
            elif tiled:
                _expand_tiled(middle, addresses, y_at + size * start * y_stride, y_stride, b_at, own, rows, n)
            else:
                _expand(sums, middle, weights, y_at + size * start * y_stride, y_stride, b_at, held, size, own, rows, n)

    return Compiled(low_rank)


# What follows is compiled apart, but for what is small: one function of it all takes the compiler twice as long.
@numba.njit(**OPTIONS)
def _look_up(middle, ids_at, a_at, held, size, own, start, rows, k):
    """middle [rows, ranks] = A[:, ids]."""
    ids = carray(pointer(ids_at + 8 * start), (rows,), np.int64)
    for r in range(len(own)):
        for g in range(rows):
            middle[g, r] = wide(_numbers(a_at, held, size, own[r] * k + ids[g], 1)[0])


@numba.njit(**OPTIONS)
def _shrink(middle, xs, weights, a_at, b_at, held, size, own, rows, k, n):
    """middle [rows, ranks] = xs [rows, K] times A's rows."""
    ranks = len(own)
    middle[:] = np.float32(0)
    for r in range(0, ranks, RANKS):
        if r + RANKS < ranks:
            _fetch(a_at, own, r + RANKS, size * k, 0, size * k)
        else:
            _fetch(b_at, own, 0, size * n, 0, size * min(TILE, n))
        for low in range(0, k, TILE):
            length = min(TILE, k - low)
            if rows == 1 and r + RANKS <= ranks:
                a0, a1, a2, a3 = _four(a_at, held, size, own, r, k, low, length)
                _multiply(middle, r, xs, low, length, rows, a0, a1, a2, a3)
            else:
                _widen_ranks(weights, a_at, held, size, own, r, k, low, length)
                _multiply(middle, r, xs, low, length, rows, weights[0], weights[1], weights[2], weights[3])


@numba.njit(**OPTIONS)
def _expand(sums, middle, weights, y_at, y_stride, b_at, held, size, own, rows, n):
    """y [rows, N] += middle [rows, ranks] times B's rows."""
    ranks = len(own)
    for low in range(0, n, TILE):
        length = min(TILE, n - low)
        for g in range(rows):
            _widen(sums[g], _numbers(y_at, held, size, g * y_stride + low, length))
        for r in range(0, ranks, RANKS):
            if r + RANKS < ranks:
                _fetch(b_at, own, r + RANKS, size * n, size * low, size * length)
            else:
                _fetch(b_at, own, 0, size * n, size * (low + TILE), size * min(TILE, n - low - TILE))
            if rows == 1 and r + RANKS <= ranks:
                b0, b1, b2, b3 = _four(b_at, held, size, own, r, n, low, length)
                _add(sums, middle, r, length, rows, b0, b1, b2, b3)
            else:
                _widen_ranks(weights, b_at, held, size, own, r, n, low, length)
                _add(sums, middle, r, length, rows, weights[0], weights[1], weights[2], weights[3])
        for g in range(rows):
            result, part = _numbers(y_at, held, size, g * y_stride + low, length), sums[g]
            for j in range(length):
                result[j] = narrow(part[j], result[j])


@numba.njit(**OPTIONS)
def _shrink_tiled(middle, tile, addresses, x_at, a_at, b_at, own, rows, k, n):
    """middle [rows, ranks] = x [rows, K] times A's rows, in bfloat16; what 32 does not divide of K number by number.

    Of one row the next rank rows are fetched between products, and the first of B behind the last.
    """
    ranks, steps = len(own), k // SHRINK_STEP
    _lie(addresses, a_at, own, k, b_at, n, 0)
    for r in range(0, ranks, SHRINK_RANKS):
        if rows > 1:
            _fetch(a_at, own, r + SHRINK_RANKS, 2 * k, 0, 2 * k)
        for g in range(0, rows, SHRINK_ROWS):
            group_at = addresses.ctypes.data + 8 * r
            if rows == 1 and r + SHRINK_RANKS <= ranks:
                shrink_row(x_at, group_at, group_at + 8 * SHRINK_RANKS, steps, middle.ctypes.data + 4 * r)
                continue
            shrink_tile(x_at + 2 * g * k, 2 * k, rows - 1 - g, group_at, ranks - 1 - r, steps, tile.ctypes.data)
            for row in range(min(SHRINK_ROWS, rows - g)):
                for rank in range(min(SHRINK_RANKS, ranks - r)):
                    middle[g + row, r + rank] = tile[row, rank]
    for row in range(rows if k % SHRINK_STEP else 0):
        for rank in range(ranks):
            x = carray(pointer(x_at + 2 * row * k), (k,), np.uint16)
            a = carray(pointer(addresses[rank]), (k,), np.uint16)
            for j in range(steps * SHRINK_STEP, k):
                middle[row, rank] += wide(x[j]) * wide(a[j])


@numba.njit(**OPTIONS)
def _expand_row(sums, middle, addresses, y_at, b_at, own, n):
    """y [N] += middle [ranks] times B's rows, in bfloat16; 32 divides N and 4 the ranks. The next rank rows are fetched
    between products."""
    _lie(addresses, b_at, own, n, b_at, n, 2 * TILE)
    for low in range(0, n, TILE):
        length = min(TILE, n - low)
        steps = length // ROW_COLUMNS
        widen_row(sums.ctypes.data, y_at + 2 * low, steps)
        for r in range(0, len(own), SHRINK_RANKS):
            group_at = addresses.ctypes.data + 8 * r
            expand_row(
                sums.ctypes.data, middle.ctypes.data + 4 * r, group_at, group_at + 8 * SHRINK_RANKS,
                2 * low, steps,
            )  # fmt: skip
        narrow_row(sums.ctypes.data, y_at + 2 * low, steps)


@numba.njit(**OPTIONS)
def _expand_tiled(middle, addresses, y_at, y_stride, b_at, own, rows, n):
    """y [rows, N] += middle [rows, ranks] times B's rows, in bfloat16; the last columns number by number."""
    ranks, whole = len(own), n // EXPAND_COLUMNS * EXPAND_COLUMNS
    _lie(addresses, b_at, own, n, b_at, n, 0)
    for low in range(0, whole, EXPAND_COLUMNS):
        for g in range(0, rows, EXPAND_ROWS):
            expand_tile(
                y_at + 2 * (g * y_stride + low), 2 * y_stride, rows - 1 - g,
                middle.ctypes.data + 4 * g * middle.shape[1], 4 * middle.shape[1],
                addresses.ctypes.data, 2 * low, ranks,
            )  # fmt: skip
    for g in range(rows):
        y = carray(pointer(y_at + 2 * g * y_stride), (n,), np.uint16)
        for j in range(whole, n):
            total = wide(y[j])
            for r in range(ranks):
                total += middle[g, r] * wide(carray(pointer(addresses[r]), (n,), np.uint16)[j])
            y[j] = narrow(total, y[j])


@numba.njit(**INLINE)
def _lie(addresses, at, own, width, next_at, next_width, offset):
    """Where the rank rows lie, in bfloat16, then what to fetch after: the next pool's first ones, from `offset` on."""
    for r in range(len(own)):
        addresses[r] = at + 2 * own[r] * width
    for r in range(SHRINK_RANKS):
        addresses[len(own) + r] = next_at + 2 * own[min(r, len(own) - 1)] * next_width + offset


@numba.njit(**INLINE)
def _numbers(at, held, size, first, count):
    return carray(pointer(at + size * first), (count,), held)


@numba.njit(**INLINE)
def _four(at, held, size, own, r, width, low, length):
    """Pieces of the rank rows r to r + 4, where they lie."""
    return (
        _numbers(at, held, size, own[r] * width + low, length),
        _numbers(at, held, size, own[r + 1] * width + low, length),
        _numbers(at, held, size, own[r + 2] * width + low, length),
        _numbers(at, held, size, own[r + 3] * width + low, length),
    )


@numba.njit(**INLINE)
def _widen_ranks(weights, at, held, size, own, r, width, low, length):
    """The same in float32; 0 past the last one."""
    for i in range(RANKS):
        if r + i < len(own):
            _widen(weights[i], _numbers(at, held, size, own[r + i] * width + low, length))
        else:
            weights[i] = np.float32(0)


@numba.njit(**INLINE)
def _fetch(at, own, first, row_bytes, begin, count):
    """Bytes `begin` to `begin` + `count` of four rank rows from `first` on, into the second level of the cache."""
    for r in range(first, min(first + RANKS, len(own))):
        for j in range(0, count, 64):
            prefetch(at + own[r] * row_bytes + begin + j)


@numba.njit(**INLINE)
def _widen(into, numbers):
    for j in range(len(numbers)):
        into[j] = wide(numbers[j])


@numba.njit(**INLINE)
def _multiply(middle, r, xs, low, length, rows, a0, a1, a2, a3):
    """middle [rows, r to r + 4] += xs [rows, low to low + length] times four pieces of A's rows."""
    for g in range(rows):
        x = xs[g, low : low + length]
        p0, p1, p2, p3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        for j in range(length):
            p0 += x[j] * wide(a0[j])
            p1 += x[j] * wide(a1[j])
            p2 += x[j] * wide(a2[j])
            p3 += x[j] * wide(a3[j])
        middle[g, r] += p0
        middle[g, r + 1] += p1
        middle[g, r + 2] += p2
        middle[g, r + 3] += p3


@numba.njit(**OPTIONS)
def _between(middle, rows, own, scale_at, bias_at, activation):
    """act(mid_scale * middle + mid_bias), in place; 0 in the lanes past the rank."""
    for r in range(len(own)):
        scale = carray(pointer(scale_at + 4 * own[r]), (1,), np.float32)[0]
        bias = carray(pointer(bias_at + 4 * own[r]), (1,), np.float32)[0] if bias_at else np.float32(0)
        for g in range(rows):
            middle[g, r] = _activate(middle[g, r] * scale + bias, activation)
    for g in range(rows):
        for r in range(len(own), len(own) + RANKS):
            middle[g, r] = np.float32(0)


@numba.njit(**INLINE)
def _activate(number, activation):
    if activation == NONE:
        return number
    if activation == RELU:
        return np.float32(0) if number < np.float32(0) else number
    if activation == GELU:
        return np.float32(0.5) * number * np.float32(1 + math.erf(number * np.float32(math.sqrt(0.5))))
    if activation == GELU_TANH:
        inner = np.float32(math.sqrt(2 / math.pi)) * (number + np.float32(0.044715) * number * number * number)
        return np.float32(0.5) * number * np.float32(1 + math.tanh(inner))
    if activation == SILU:
        return number / (np.float32(1) + exp(-number))
    return np.float32(math.tanh(number))


@numba.njit(**INLINE)
def _add(sums, middle, r, length, rows, b0, b1, b2, b3):
    """sums [rows, length] += middle [rows, r to r + 4] times four pieces of B's rows."""
    for g in range(rows):
        part = sums[g]
        m0, m1, m2, m3 = middle[g, r], middle[g, r + 1], middle[g, r + 2], middle[g, r + 3]
        for j in range(length):
            part[j] += m0 * wide(b0[j]) + m1 * wide(b1[j]) + m2 * wide(b2[j]) + m3 * wide(b3[j])
