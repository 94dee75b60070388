"""The innermost loops of decode attention in bfloat16, in registers: a page of 16 keys, or of 16 values.

    score_page    keys times queries        `LANES` sums, of some keys times one query or two; then a vector of scores
    add_page      values times weights      `LANES` sums, of some numbers of the values for up to four queries

Keys are multiplied as they lie, two neighbours to a lane (`dot`). Values are widened in registers, once for all
queries of a tile; their weights stay float32.
"""
# numba compiles what it sees, whatever the types say.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import math
from itertools import product
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from chorus.kernels.native.dot_tile import PANEL
from chorus.kernels.native.numbers import INLINE, ask_for, exp, pointer, prefetch
from chorus.kernels.native.vectors import (
    INT64,
    LANES,
    SUMS,
    WORDS,
    at_most,
    dot,
    exp2,
    float_in_every_lane,
    higher,
    highest_lane,
    in_every_lane,
    lanes_between,
    load,
    load_pairs,
    load_widened,
    multiply_add,
    scaled,
    some_lanes,
    store,
    store_narrowed,
    sum_of_lanes,
    sums_of_lanes,
    transposed,
)

KEYS = 16
LOG2_E = math.log2(math.e)
_QUERIES = 16 // LANES  # that share keys: with half as many sums a query, each key is read once for two
_TOGETHER = 4  # queries that share values, at most
_ASKED = 64 * KEYS  # bytes that `_score` asks for


@numba.njit(**INLINE)
def score_page(dim, scores, query_at, query_stride, keys_at, stride, scale, ahead_at):
    """scores [G, 16 of them], float32 = scale times queries [G, dim] times a page of keys [16, dim].

    `dim`, a constant, is a multiple of 16; addresses and strides in bytes. Meanwhile a page at `ahead_at` is fetched.
    """
    size, row, asked = KEYS * stride, scores.strides[0], 0
    for g in range(0, len(scores), _QUERIES):
        at, scores_at, ahead = query_at + g * query_stride, scores[g].ctypes.data, ahead_at + min(asked, size - _ASKED)
        if g + _QUERIES <= len(scores):
            _score(dim, _QUERIES, at, query_stride, keys_at, stride, scale, scores_at, row, ahead)
        else:
            _score(dim, 1, at, query_stride, keys_at, stride, scale, scores_at, row, ahead)
        asked += _ASKED
    fetch(ahead_at + asked, size - asked)


@numba.njit(**INLINE)
def add_page(dim, sums, weights, values_at, stride, ahead_at):
    """sums [G, dim], float32 += weights [G, n] times values [n, dim]; sums in an order of their own.

    As above; as many values at `ahead_at` are fetched.
    """
    row, values = weights.strides[0], weights.shape[1]
    for g in range(0, len(sums), _TOGETHER):
        sums_at, weights_at, last = sums[g].ctypes.data, weights[g].ctypes.data, len(sums) - 1 - g
        if last == 0:
            _add(dim, 1, sums_at, last, weights_at, row, values_at, stride, values, ahead_at)
        elif last == 1:
            _add(dim, 2, sums_at, last, weights_at, row, values_at, stride, values, ahead_at)
        else:
            _add(dim, _TOGETHER, sums_at, last, weights_at, row, values_at, stride, values, ahead_at)


@numba.njit(**INLINE)
def write_rows(dim, out_at, sums, totals):
    """out [G, dim], bfloat16 = what `add_page` has summed, over totals [G]."""
    for g in range(len(sums)):
        write(dim, out_at + 2 * dim * g, sums[g].ctypes.data, np.float32(1) / totals[g])


@numba.njit(**INLINE)
def lay_keys(dim, into_at, keys_at, stride):
    """A page of keys [16, dim] as 16 columns of a packed weight [dim / 2, 64, 2]; `dim` a multiple of 32."""
    for low in range(0, dim // 2, KEYS):
        _turn(into_at + 4 * PANEL * low, keys_at + 4 * low, stride)


@numba.njit(**INLINE)
def lay_values(dim, into, values_at, stride):
    """A page of values [16, dim] as 8 pairs of rows of a packed weight, into [panels, 8 or more, 64], a pair a word."""
    for pair in range(KEYS // 2):
        one = carray(pointer(values_at + 2 * pair * stride), (dim,), np.uint16)
        other = carray(pointer(values_at + (2 * pair + 1) * stride), (dim,), np.uint16)
        for panel in range(len(into)):
            for d in range(min(PANEL, dim - PANEL * panel)):
                low, high = one[PANEL * panel + d], other[PANEL * panel + d]
                into[panel, pair, d] = np.int32(low) | np.int32(high) << np.int32(16)


@numba.njit(**INLINE)
def powers(numbers, highest):
    """e^(numbers - highest), float32, in place; returns their sum. There is room for a vector past the last."""
    if LANES == 16:
        total = _powers(numbers.ctypes.data, len(numbers), highest)
    else:
        total = np.float32(0)
        for j in range(len(numbers)):
            numbers[j] = exp(numbers[j] - highest)
            total += numbers[j]
    return total


@numba.njit(**INLINE)
def fetch(at, count):
    """So many bytes, into the second level of the cache."""
    for j in range(0, count, 64):
        prefetch(at + j)


@numba.njit(**INLINE)
def highest(numbers):
    """The highest of some float32 that are not NaN; -inf of none."""
    whole = len(numbers) // LANES
    found = _highest(numbers.ctypes.data, whole)
    for j in range(whole * LANES, len(numbers)):
        found = max(found, numbers[j])
    return found


@intrinsic(prefer_literal=True)
def _score(
    typing: Any,
    dim: Any,
    together: Any,
    query_at: Any,
    query_stride: Any,
    key_at: Any,
    key_stride: Any,
    scale: Any,
    scores_at: Any,
    scores_stride: Any,
    ahead_at: Any,
) -> Any:
    """scores [Q, 16], float32 = scale times queries [Q, dim] times keys [16, dim].

    Constants are `dim`, a multiple of 16, and Q, `together`, which divides `LANES`; int64, addresses and strides in
    bytes. Meanwhile 1 KiB from `ahead_at` on is asked for.
    """
    size, count = dim.literal_value, together.literal_value
    keys = LANES // count

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, _, query_at, query_stride, key_at, key_stride, scale, scores_at, scores_stride, ahead_at = arguments
        queries = [
            load_pairs(builder, builder.add(query_at, builder.mul(query_stride, INT64(query))), size)
            for query in range(count)
        ]
        with cgutils.for_range(builder, INT64(KEYS // keys)) as loop:
            first = builder.mul(INT64(keys), loop.index)
            kept = []
            for key in range(keys):
                number = builder.add(first, INT64(key))
                ask_for(builder, builder.add(ahead_at, builder.mul(INT64(64), number)))
                kept.append(load_pairs(builder, builder.add(key_at, builder.mul(key_stride, number)), size))
            places = list(product(range(count), range(keys)))
            sums = dict.fromkeys(places, ir.Constant(SUMS, [0.0] * LANES))
            for i in range(len(kept[0])):
                for query, key in places:
                    sums[query, key] = dot(builder, sums[query, key], queries[query][i], kept[key][i])
            scores = scaled(builder, sums_of_lanes(builder, list(sums.values())), scale)
            for query in range(count):
                at = builder.add(scores_at, builder.mul(scores_stride, INT64(query)))
                at = builder.add(at, builder.mul(INT64(4), first))
                store(builder, some_lanes(builder, scores, keys * query, keys), at, 4)
        return context.get_dummy_value()

    return types.void(dim, together, *[types.int64] * 4, types.float32, *[types.int64] * 3), build


@intrinsic(prefer_literal=True)
def _add(
    typing: Any,
    dim: Any,
    together: Any,
    sums_at: Any,
    last: Any,
    weights_at: Any,
    weights_stride: Any,
    value_at: Any,
    value_stride: Any,
    values: Any,
    ahead_at: Any,
) -> Any:
    """sums [Q, dim], float32 += weights [Q, values] times values [values, dim].

    Constants are `dim`, a multiple of 16, and Q, `together`; int64, addresses and strides in bytes. In the place of
    queries past number `last` that one is computed again. Meanwhile as many values from `ahead_at` on are asked for.
    """
    size, queries = dim.literal_value, range(together.literal_value)
    width = LANES // len(queries)

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, _, sums_at, last, weights_at, weights_stride, value_at, value_stride, values, ahead_at = arguments
        row_of = [at_most(builder, query, last) for query in queries]
        rows = [builder.add(sums_at, builder.mul(INT64(4 * size), row)) for row in row_of]
        weights = [builder.add(weights_at, builder.mul(weights_stride, row)) for row in row_of]
        for low in range(0, size // LANES, width):
            vectors = range(low, min(low + width, size // LANES))
            places = {(q, v): builder.add(rows[q], INT64(4 * LANES * v)) for q, v in product(queries, vectors)}
            sums = {
                place: cgutils.alloca_once_value(builder, load(builder, at, SUMS, 4)) for place, at in places.items()
            }
            with cgutils.for_range(builder, values) as loop:
                offset = builder.mul(value_stride, loop.index)
                for v in vectors:
                    if 2 * LANES * v % 64 == 0:
                        ask_for(builder, builder.add(builder.add(ahead_at, offset), INT64(2 * LANES * v)))
                at = builder.add(value_at, offset)
                value = load_widened(builder, builder.add(at, INT64(2 * LANES * low)), LANES * len(vectors))
                for q in queries:
                    weight = float_in_every_lane(builder, builder.add(weights[q], builder.mul(INT64(4), loop.index)))
                    for v in vectors:
                        total = multiply_add(builder, weight, value[v - low], builder.load(sums[q, v]))
                        builder.store(total, sums[q, v])
            for place, at in places.items():
                store(builder, builder.load(sums[place]), at, 4)
        return context.get_dummy_value()

    return types.void(dim, together, *[types.int64] * 8), build


@intrinsic(prefer_literal=True)
def write(typing: Any, dim: Any, out_at: Any, sums_at: Any, factor: Any) -> Any:
    """out [dim], bfloat16 = sums [dim], in the order of `load_widened`, times a factor."""
    size = dim.literal_value

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, out_at, sums_at, factor = arguments
        places = [builder.add(sums_at, INT64(4 * LANES * v)) for v in range(size // LANES)]
        sums = [scaled(builder, load(builder, at, SUMS, 4), factor) for at in places]
        store_narrowed(builder, sums, out_at)
        return context.get_dummy_value()

    return types.void(dim, types.int64, types.int64, types.float32), build


@intrinsic
def _turn(typing: Any, into_at: Any, rows_at: Any, stride: Any) -> Any:
    """The first 16 columns of into [16, 64] = the transpose of rows [16, 16], words of 32 bits. `LANES` is 16."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        into_at, rows_at, stride = arguments
        rows = [load(builder, builder.add(rows_at, builder.mul(stride, INT64(i))), WORDS, 4) for i in range(KEYS)]
        for i, column in enumerate(transposed(builder, rows)):
            store(builder, column, builder.add(into_at, INT64(4 * PANEL * i)), 64)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), build


@intrinsic(prefer_literal=True)
def highest_seen(typing: Any, keys: Any, all_seen: Any, scores_at: Any, begin: Any, end: Any) -> Any:
    """The highest of scores [keys], float32, of numbers `begin` and on, before `end`.

    Constants are `keys`, a multiple of `LANES`, and `all_seen`: then begin and end do not matter.
    """
    size, every = keys.literal_value, all_seen.literal_value

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, _, scores_at, begin, end = arguments
        found = nothing = ir.Constant(SUMS, [-math.inf] * LANES)
        for first in range(0, size, LANES):
            numbers = load(builder, builder.add(scores_at, INT64(4 * first)), SUMS, 64)
            if not every:
                numbers = builder.select(lanes_between(builder, first, begin, end), numbers, nothing)
            found = higher(builder, numbers, found)
        return highest_lane(builder, found)

    return types.float32(keys, all_seen, types.int64, types.int64, types.int64), build


@intrinsic(prefer_literal=True)
def weigh_seen(
    typing: Any,
    keys: Any,
    all_seen: Any,
    weights_at: Any,
    scores_at: Any,
    scale: Any,
    high: Any,
    begin: Any,
    end: Any,
) -> Any:
    """Weights [keys], bfloat16 = 2^(scale (scores - high)), 0 of what is not seen, as above; returns their sum."""
    size, every = keys.literal_value, all_seen.literal_value

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, _, weights_at, scores_at, scale, high, begin, end = arguments
        total = nothing = ir.Constant(SUMS, [0.0] * LANES)
        top, factor = in_every_lane(builder, high), in_every_lane(builder, scale)
        for first in range(0, size, LANES):
            numbers = load(builder, builder.add(scores_at, INT64(4 * first)), SUMS, 64)
            weights = exp2(builder, builder.fmul(builder.fsub(numbers, top), factor))
            if not every:
                weights = builder.select(lanes_between(builder, first, begin, end), weights, nothing)
            place = builder.add(weights_at, INT64(2 * first))
            store_narrowed(builder, [weights], place)
            total = builder.fadd(total, load_widened(builder, place, LANES)[0])
        return sum_of_lanes(builder, total)

    floats, integers = [types.float32] * 2, [types.int64] * 2
    return types.float32(keys, all_seen, *integers, *floats, *integers), build


@intrinsic
def _powers(typing: Any, at: Any, count: Any, highest: Any) -> Any:
    """e^(numbers - highest) of so many float32, in place, and 0 up to the next whole vector; their sum."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at, count, highest = arguments
        nothing = ir.Constant(SUMS, [0.0] * LANES)
        total = cgutils.alloca_once_value(builder, nothing)
        top, factor = in_every_lane(builder, highest), ir.Constant(SUMS, [LOG2_E] * LANES)
        with cgutils.for_range(builder, builder.udiv(builder.add(count, INT64(LANES - 1)), INT64(LANES))) as loop:
            first = builder.mul(INT64(LANES), loop.index)
            place = builder.add(at, builder.mul(INT64(4), first))
            below = builder.fsub(
                load(builder, place, SUMS, 4), top
            )  # first: of the highest one that is 0, and not nearly
            each = exp2(builder, builder.fmul(below, factor))
            is_one = lanes_between(builder, 0, INT64(0), builder.sub(count, first))
            each = builder.select(is_one, each, nothing)
            store(builder, each, place, 4)
            builder.store(builder.fadd(builder.load(total), each), total)
        return sum_of_lanes(builder, builder.load(total))

    return types.float32(types.int64, types.int64, types.float32), build


@intrinsic
def _highest(typing: Any, at: Any, vectors: Any) -> Any:
    """The highest number of so many vectors at an address; -inf of none."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at, vectors = arguments
        found = cgutils.alloca_once_value(builder, ir.Constant(SUMS, [-math.inf] * LANES))
        with cgutils.for_range(builder, vectors) as loop:
            numbers = load(builder, builder.add(at, builder.mul(INT64(4 * LANES), loop.index)), SUMS, 4)
            builder.store(higher(builder, numbers, builder.load(found)), found)
        return highest_lane(builder, builder.load(found))

    return types.float32(types.int64, types.int64), build
