"""The innermost loops of `low_rank` in bfloat16, in registers.

    shrink_tile    4 rows of x, 4 rank rows of A     32 numbers of K at a time, 16 sums, each over lanes at the end
    expand_tile    8 rows of y, 32 columns           16 sums, one rank row of B at a time, widened once for all 8
    shrink_row     1 row of x, 4 rank rows of A      the same sums in the same order; memory is what it waits for, so
    expand_row     1 row of sums, 4 rank rows of B   the next rank rows are fetched between products

A row comes out alike, to the bit, alone and among others of its adapter.
"""
# numba's decorators have no types.
# mypy: disable-error-code="untyped-decorator"

from itertools import product
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from chorus.kernels.native.numbers import ask_for
from chorus.kernels.native.vectors import (
    INT64,
    PAIRS,
    SUMS,
    at_most,
    dot,
    float_in_every_lane,
    load,
    load_widened,
    multiply_add,
    store,
    store_narrowed,
    sum_of_lanes,
)

SHRINK_ROWS, SHRINK_RANKS, SHRINK_STEP = 4, 4, 32
EXPAND_ROWS, EXPAND_COLUMNS = 8, 32
AHEAD = 512  # bytes of each rank row of B that are fetched before they are needed


@intrinsic
def shrink_tile(
    typing: Any, x_at: Any, x_stride: Any, last_row: Any, a_rows_at: Any, last_rank: Any, steps: Any, out_at: Any
) -> Any:
    """out [4, 4], float32 = x [4, 32 steps] times four rank rows, whose addresses lie at `a_rows_at`.

    int64, strides in bytes. In the place of rows past `last_row` and ranks past `last_rank` those are computed again.
    """
    return types.void(*[types.int64] * 7), _build_shrink


def _build_shrink(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    x_at, x_stride, last_row, a_rows_at, last_rank, steps, out_at = arguments
    places = list(product(range(SHRINK_ROWS), range(SHRINK_RANKS)))
    zero = ir.Constant(SUMS, [0.0] * 16)
    sums = {place: cgutils.alloca_once_value(builder, zero) for place in places}
    xs = [builder.add(x_at, builder.mul(x_stride, at_most(builder, row, last_row))) for row in range(SHRINK_ROWS)]
    ranks = [
        load(builder, builder.add(a_rows_at, builder.mul(INT64(8), at_most(builder, rank, last_rank))), INT64, 8)
        for rank in range(SHRINK_RANKS)
    ]
    with cgutils.for_range(builder, steps) as loop:
        offset = builder.mul(INT64(2 * SHRINK_STEP), loop.index)
        x = [load(builder, builder.add(at, offset), PAIRS, 2) for at in xs]
        for rank, at in enumerate(ranks):
            a = load(builder, builder.add(at, offset), PAIRS, 2)
            for row in range(SHRINK_ROWS):
                builder.store(dot(builder, builder.load(sums[row, rank]), x[row], a), sums[row, rank])
    for row, rank in places:
        total = sum_of_lanes(builder, builder.load(sums[row, rank]))
        store(builder, total, builder.add(out_at, INT64(4 * (SHRINK_RANKS * row + rank))), 4)
    return context.get_dummy_value()


@intrinsic
def expand_tile(
    typing: Any,
    y_at: Any,
    y_stride: Any,
    last_row: Any,
    middle_at: Any,
    middle_stride: Any,
    b_rows_at: Any,
    offset: Any,
    ranks: Any,
) -> Any:
    """y [8, 32] += middle [8, ranks], float32, times 32 columns of as many rows of B, each rounded once.

    B's rows lie at the addresses at `b_rows_at`, plus `offset`. int64, strides and offset in bytes. In the place of
    rows past `last_row` that row is computed again.
    """
    return types.void(*[types.int64] * 8), _build_expand


def _build_expand(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    y_at, y_stride, last_row, middle_at, middle_stride, b_rows_at, offset, ranks = arguments
    vectors = range(EXPAND_COLUMNS // 16)
    row_of = [at_most(builder, row, last_row) for row in range(EXPAND_ROWS)]
    ys = [builder.add(y_at, builder.mul(y_stride, row)) for row in row_of]
    middles = [builder.add(middle_at, builder.mul(middle_stride, row)) for row in row_of]
    places = {(row, v): builder.add(ys[row], INT64(32 * v)) for row in range(EXPAND_ROWS) for v in vectors}
    sums = {place: cgutils.alloca_once_value(builder, load_widened(builder, at)) for place, at in places.items()}
    with cgutils.for_range(builder, ranks) as loop:
        b_at = load(builder, builder.add(b_rows_at, builder.mul(INT64(8), loop.index)), INT64, 8)
        b_at = builder.add(b_at, offset)
        ask_for(builder, builder.add(b_at, INT64(AHEAD)))
        b = [load_widened(builder, builder.add(b_at, INT64(32 * v))) for v in vectors]
        for row in range(EXPAND_ROWS):
            m = float_in_every_lane(builder, builder.add(middles[row], builder.mul(INT64(4), loop.index)))
            for v in vectors:
                builder.store(multiply_add(builder, m, b[v], builder.load(sums[row, v])), sums[row, v])
    for place, at in places.items():
        store_narrowed(builder, builder.load(sums[place]), at)
    return context.get_dummy_value()


@intrinsic
def shrink_row(typing: Any, x_at: Any, a_rows_at: Any, next_rows_at: Any, steps: Any, out_at: Any) -> Any:
    """out [4], float32 = x [32 steps] times four rank rows, while four others are fetched from memory."""
    return types.void(*[types.int64] * 5), _build_shrink_row


def _build_shrink_row(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    x_at, a_rows_at, next_rows_at, steps, out_at = arguments
    zero = ir.Constant(SUMS, [0.0] * 16)
    sums = [cgutils.alloca_once_value(builder, zero) for _ in range(SHRINK_RANKS)]
    ranks = [load(builder, builder.add(a_rows_at, INT64(8 * rank)), INT64, 8) for rank in range(SHRINK_RANKS)]
    others = [load(builder, builder.add(next_rows_at, INT64(8 * rank)), INT64, 8) for rank in range(SHRINK_RANKS)]
    with cgutils.for_range(builder, steps) as loop:
        offset = builder.mul(INT64(2 * SHRINK_STEP), loop.index)
        x = load(builder, builder.add(x_at, offset), PAIRS, 2)
        for rank in range(SHRINK_RANKS):
            ask_for(builder, builder.add(others[rank], offset))
            a = load(builder, builder.add(ranks[rank], offset), PAIRS, 2)
            builder.store(dot(builder, builder.load(sums[rank]), x, a), sums[rank])
    for rank in range(SHRINK_RANKS):
        total = sum_of_lanes(builder, builder.load(sums[rank]))
        store(builder, total, builder.add(out_at, INT64(4 * rank)), 4)
    return context.get_dummy_value()


@intrinsic
def expand_row(
    typing: Any, sums_at: Any, middle_at: Any, b_rows_at: Any, next_rows_at: Any, offset: Any, steps: Any
) -> Any:
    """sums [32 steps], float32 += middle [4] times four rank rows from `offset` on, while four others are fetched."""
    return types.void(*[types.int64] * 6), _build_expand_row


def _build_expand_row(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    sums_at, middle_at, b_rows_at, next_rows_at, offset, steps = arguments
    each = range(SHRINK_RANKS)
    middle = [float_in_every_lane(builder, builder.add(middle_at, INT64(4 * rank))) for rank in each]
    ranks, others = (
        [builder.add(load(builder, builder.add(at, INT64(8 * rank)), INT64, 8), offset) for rank in each]
        for at in (b_rows_at, next_rows_at)
    )
    with cgutils.for_range(builder, steps) as loop:
        at = builder.mul(INT64(64), loop.index)
        for rank in each:
            ask_for(builder, builder.add(others[rank], at))
        for v in range(2):
            place = builder.add(builder.add(sums_at, builder.mul(INT64(128), loop.index)), INT64(64 * v))
            total = load(builder, place, SUMS, 4)
            for rank in each:
                b = load_widened(builder, builder.add(builder.add(ranks[rank], at), INT64(32 * v)))
                total = multiply_add(builder, middle[rank], b, total)
            store(builder, total, place, 4)
    return context.get_dummy_value()
