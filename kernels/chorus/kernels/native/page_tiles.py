"""The innermost loops of decode attention in bfloat16, in registers: a page of 16 keys, or of 16 values.

    score_page    keys times a query                    16 sums, turned into one vector of 16 scores
    add_page      values times their weights            16 sums of 16 numbers, of as many queries as that holds;
                                                        4 where registers are half as wide, and half as many

Keys are multiplied as they lie, two neighbours to a lane (`dot`). Values are widened in registers, once for all
queries of a tile; their weights stay float32.
"""
# numba compiles what it sees, whatever the types say.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from itertools import product
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from chorus.kernels.native.numbers import INLINE, ask_for, prefetch
from chorus.kernels.native.vectors import (
    INT64,
    PAIRS,
    SUMS,
    at_most,
    cpu_has,
    dot,
    float_in_every_lane,
    load,
    load_half,
    load_widened,
    multiply_add,
    scaled,
    store,
    sums_of_lanes,
)

KEYS = 16
_ASKED = 64 * KEYS  # bytes that `_score` asks for
_SUMS = 16 if cpu_has("avx512f") else 4  # vectors of them at a time: half of the registers, of heads up to 64 wide


@numba.njit(**INLINE)
def score_page(dim, scores, query_at, query_stride, keys_at, stride, scale, ahead_at):
    """scores [G, 16 of them], float32 = scale times queries [G, dim] times a page of keys [16, dim].

    `dim`, a constant, is a multiple of 16; addresses and strides in bytes. Meanwhile a page at `ahead_at` is fetched.
    """
    size = KEYS * stride
    for g in range(len(scores)):
        ahead = ahead_at + min(_ASKED * g, size - _ASKED)
        _score(dim, query_at + g * query_stride, keys_at, stride, scale, scores[g].ctypes.data, ahead)
    fetch(ahead_at + _ASKED * len(scores), size - _ASKED * len(scores))


@numba.njit(**INLINE)
def add_page(dim, sums, weights, values_at, stride, ahead_at):
    """sums [G, dim], float32 += weights [G, n] times values [n, dim].

    As above; as many values at `ahead_at` are fetched.
    """
    together = max(16 * _SUMS // dim, 1)
    for g in range(0, len(sums), together):
        sums_at, weights_at, row = sums[g].ctypes.data, weights[g].ctypes.data, weights.strides[0]
        last, values = len(sums) - 1 - g, weights.shape[1]
        if last == 0:
            _add(dim, 1, sums_at, last, weights_at, row, values_at, stride, values, ahead_at)
        elif last == 1 and together > 1:
            _add(dim, 2, sums_at, last, weights_at, row, values_at, stride, values, ahead_at)
        else:
            _add(dim, 0, sums_at, last, weights_at, row, values_at, stride, values, ahead_at)


@numba.njit(**INLINE)
def fetch(at, count):
    """So many bytes, into the second level of the cache."""
    for j in range(0, count, 64):
        prefetch(at + j)


@intrinsic(prefer_literal=True)
def _score(
    typing: Any, dim: Any, query_at: Any, key_at: Any, key_stride: Any, scale: Any, scores_at: Any, ahead_at: Any
) -> Any:
    """scores [16], float32 = scale times query [dim] times keys [16, dim].

    `dim`, a constant, is a multiple of 16; int64, addresses and the stride in bytes. Meanwhile 1 KiB
    from `ahead_at` on is asked for.
    """
    size = dim.literal_value

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, query_at, key_at, key_stride, scale, scores_at, ahead_at = arguments
        query = _pairs(builder, query_at, size)
        sums = []
        for key in range(KEYS):
            at = builder.add(key_at, builder.mul(key_stride, INT64(key)))
            ask_for(builder, builder.add(ahead_at, INT64(64 * key)))
            total = ir.Constant(SUMS, [0.0] * 16)
            for asked, kept in zip(query, _pairs(builder, at, size), strict=True):
                total = dot(builder, total, asked, kept)
            sums.append(total)
        store(builder, scaled(builder, sums_of_lanes(builder, sums), scale), scores_at, 4)
        return context.get_dummy_value()

    return types.void(dim, types.int64, types.int64, types.int64, types.float32, types.int64, types.int64), build


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

    Q is `together`, or as many as there are registers for if that is 0. Constants are `dim`, a multiple of 16, and
    `together`; int64, addresses and strides in bytes. In the place of queries past number `last` that one is computed
    again. Meanwhile as many values from `ahead_at` on are asked for.
    """
    size = dim.literal_value
    count = together.literal_value or max(16 * _SUMS // size, 1)

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, _, sums_at, last, weights_at, weights_stride, value_at, value_stride, values, ahead_at = arguments
        queries, vectors = range(count), range(size // 16)
        row_of = [at_most(builder, query, last) for query in queries]
        rows = [builder.add(sums_at, builder.mul(INT64(4 * size), row)) for row in row_of]
        weights = [builder.add(weights_at, builder.mul(weights_stride, row)) for row in row_of]
        places = {(q, v): builder.add(rows[q], INT64(64 * v)) for q, v in product(queries, vectors)}
        sums = {place: cgutils.alloca_once_value(builder, load(builder, at, SUMS, 4)) for place, at in places.items()}
        with cgutils.for_range(builder, values) as loop:
            offset = builder.mul(value_stride, loop.index)
            for line in range((size + 31) // 32):
                ask_for(builder, builder.add(builder.add(ahead_at, offset), INT64(64 * line)))
            at = builder.add(value_at, offset)
            value = [load_widened(builder, builder.add(at, INT64(32 * v))) for v in vectors]
            for q in queries:
                weight = float_in_every_lane(builder, builder.add(weights[q], builder.mul(INT64(4), loop.index)))
                for v in vectors:
                    builder.store(multiply_add(builder, weight, value[v], builder.load(sums[q, v])), sums[q, v])
        for place, at in places.items():
            store(builder, builder.load(sums[place]), at, 4)
        return context.get_dummy_value()

    return types.void(dim, together, *[types.int64] * 8), build


def _pairs(builder: Any, at: Any, count: int) -> list[Any]:
    """So many numbers of bfloat16, 32 to a vector; the last ends with zeros if 16 are left."""
    whole = [load(builder, builder.add(at, INT64(64 * i)), PAIRS, 2) for i in range(count // 32)]
    return whole if count % 32 == 0 else [*whole, load_half(builder, builder.add(at, INT64(2 * (count - 16))))]
