"""The innermost loops of `low_rank` in bfloat16, in registers.

    shrink_tile    4 rows of x, 4 rank rows of A     32 numbers of K at a time, 16 sums, each over lanes at the end
    expand_tile    8 rows of y, 2 vectors            16 sums, one rank row of B at a time, widened once for all 8
    shrink_row     1 row of x, 4 rank rows of A      the same sums in the same order; memory is what it waits for, so
    expand_row     1 row of sums, 4 rank rows of B   the next rank rows are fetched between products

Of 16 registers half as many rows have half as many sums. A row comes out alike, to the bit, alone and among others of
its adapter.
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
    LANES,
    SUMS,
    at_most,
    dot,
    float_in_every_lane,
    load,
    load_pairs,
    load_widened,
    multiply_add,
    store,
    store_narrowed,
    sum_of_lanes,
)

SHRINK_ROWS, SHRINK_RANKS, SHRINK_STEP = LANES // 4, 4, 32
EXPAND_ROWS, EXPAND_COLUMNS, ROW_COLUMNS = LANES // 2, 2 * LANES, 32
AHEAD = 512  # bytes of each rank row of B that are fetched before they are needed


@intrinsic
def shrink_tile(
    typing: Any, x_at: Any, x_stride: Any, last_row: Any, a_rows_at: Any, last_rank: Any, steps: Any, out_at: Any
) -> Any:
    """out [R, 4], float32 = x [R, 32 steps] times four rank rows, whose addresses lie at `a_rows_at`.

    R is `SHRINK_ROWS`; int64, strides in bytes. In the place of rows past `last_row` and ranks past `last_rank` those
    are computed again.
    """
    return types.void(*[types.int64] * 7), _build_shrink


def _build_shrink(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    x_at, x_stride, last_row, a_rows_at, last_rank, steps, out_at = arguments
    places = list(product(range(SHRINK_ROWS), range(SHRINK_RANKS)))
    zero = ir.Constant(SUMS, [0.0] * LANES)
    sums = {place: cgutils.alloca_once_value(builder, zero) for place in places}
    xs = [builder.add(x_at, builder.mul(x_stride, at_most(builder, row, last_row))) for row in range(SHRINK_ROWS)]
    ranks = [
        load(builder, builder.add(a_rows_at, builder.mul(INT64(8), at_most(builder, rank, last_rank))), INT64, 8)
        for rank in range(SHRINK_RANKS)
    ]
    with cgutils.for_range(builder, steps) as loop:
        offset = builder.mul(INT64(2 * SHRINK_STEP), loop.index)
        x = [load_pairs(builder, builder.add(at, offset), SHRINK_STEP) for at in xs]
        a = [load_pairs(builder, builder.add(at, offset), SHRINK_STEP) for at in ranks]
        for part, rank, row in product(range(len(x[0])), range(SHRINK_RANKS), range(SHRINK_ROWS)):
            total = dot(builder, builder.load(sums[row, rank]), x[row][part], a[rank][part])
            builder.store(total, sums[row, rank])
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
    """y [R, C] += middle [R, ranks], float32, times C columns of as many rows of B, each rounded once.

    R and C are `EXPAND_ROWS` and `EXPAND_COLUMNS`; B's rows lie at the addresses at `b_rows_at`, plus `offset`. int64,
    strides and offset in bytes. In the place of rows past `last_row` that row is computed again.
    """
    return types.void(*[types.int64] * 8), _build_expand


def _build_expand(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    y_at, y_stride, last_row, middle_at, middle_stride, b_rows_at, offset, ranks = arguments
    row_of = [at_most(builder, row, last_row) for row in range(EXPAND_ROWS)]
    ys = [builder.add(y_at, builder.mul(y_stride, row)) for row in row_of]
    middles = [builder.add(middle_at, builder.mul(middle_stride, row)) for row in row_of]
    sums = [
        [cgutils.alloca_once_value(builder, total) for total in load_widened(builder, y, EXPAND_COLUMNS)] for y in ys
    ]
    with cgutils.for_range(builder, ranks) as loop:
        b_at = load(builder, builder.add(b_rows_at, builder.mul(INT64(8), loop.index)), INT64, 8)
        b_at = builder.add(b_at, offset)
        ask_for(builder, builder.add(b_at, INT64(AHEAD)))
        b = load_widened(builder, b_at, EXPAND_COLUMNS)
        for middle, totals in zip(middles, sums, strict=True):
            m = float_in_every_lane(builder, builder.add(middle, builder.mul(INT64(4), loop.index)))
            for numbers, total in zip(b, totals, strict=True):
                builder.store(multiply_add(builder, m, numbers, builder.load(total)), total)
    for y, totals in zip(ys, sums, strict=True):
        store_narrowed(builder, [builder.load(total) for total in totals], y)
    return context.get_dummy_value()


@intrinsic
def shrink_row(typing: Any, x_at: Any, a_rows_at: Any, next_rows_at: Any, steps: Any, out_at: Any) -> Any:
    """out [4], float32 = x [32 steps] times four rank rows, while four others are fetched from memory."""
    return types.void(*[types.int64] * 5), _build_shrink_row


def _build_shrink_row(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    x_at, a_rows_at, next_rows_at, steps, out_at = arguments
    zero = ir.Constant(SUMS, [0.0] * LANES)
    sums = [cgutils.alloca_once_value(builder, zero) for _ in range(SHRINK_RANKS)]
    ranks = [load(builder, builder.add(a_rows_at, INT64(8 * rank)), INT64, 8) for rank in range(SHRINK_RANKS)]
    others = [load(builder, builder.add(next_rows_at, INT64(8 * rank)), INT64, 8) for rank in range(SHRINK_RANKS)]
    with cgutils.for_range(builder, steps) as loop:
        offset = builder.mul(INT64(2 * SHRINK_STEP), loop.index)
        x = load_pairs(builder, builder.add(x_at, offset), SHRINK_STEP)
        for rank in range(SHRINK_RANKS):
            ask_for(builder, builder.add(others[rank], offset))
            total = builder.load(sums[rank])
            for own, a in zip(x, load_pairs(builder, builder.add(ranks[rank], offset), SHRINK_STEP), strict=True):
                total = dot(builder, total, own, a)
            builder.store(total, sums[rank])
    for rank in range(SHRINK_RANKS):
        total = sum_of_lanes(builder, builder.load(sums[rank]))
        store(builder, total, builder.add(out_at, INT64(4 * rank)), 4)
    return context.get_dummy_value()


@intrinsic
def expand_row(
    typing: Any, sums_at: Any, middle_at: Any, b_rows_at: Any, next_rows_at: Any, offset: Any, steps: Any
) -> Any:
    """sums [32 steps], float32 += middle [4] times four rank rows from `offset` on, while four others are fetched.

    Sums are in the order of `load_widened`.
    """
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
        at = builder.mul(INT64(2 * ROW_COLUMNS), loop.index)
        b = []
        for rank in each:
            ask_for(builder, builder.add(others[rank], at))
            b.append(load_widened(builder, builder.add(ranks[rank], at), ROW_COLUMNS))
        first = builder.add(sums_at, builder.mul(INT64(4 * ROW_COLUMNS), loop.index))
        for v in range(ROW_COLUMNS // LANES):
            place = builder.add(first, INT64(4 * LANES * v))
            total = load(builder, place, SUMS, 4)
            for rank in each:
                total = multiply_add(builder, middle[rank], b[rank][v], total)
            store(builder, total, place, 4)
    return context.get_dummy_value()


@intrinsic
def widen_row(typing: Any, sums_at: Any, y_at: Any, steps: Any) -> Any:
    """sums [32 steps], float32, in the order of `expand_row` = y [32 steps], bfloat16."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums_at, y_at, steps = arguments
        with cgutils.for_range(builder, steps) as loop:
            sums, y = _at_step(builder, loop, sums_at, y_at)
            for v, numbers in enumerate(load_widened(builder, y, ROW_COLUMNS)):
                store(builder, numbers, builder.add(sums, INT64(4 * LANES * v)), 4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), build


@intrinsic
def narrow_row(typing: Any, sums_at: Any, y_at: Any, steps: Any) -> Any:
    """y [32 steps], bfloat16 = sums [32 steps], float32, in the order of `expand_row`."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums_at, y_at, steps = arguments
        with cgutils.for_range(builder, steps) as loop:
            sums, y = _at_step(builder, loop, sums_at, y_at)
            places = [builder.add(sums, INT64(4 * LANES * v)) for v in range(ROW_COLUMNS // LANES)]
            store_narrowed(builder, [load(builder, at, SUMS, 4) for at in places], y)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), build


def _at_step(builder: Any, loop: Any, sums_at: Any, y_at: Any) -> tuple[Any, Any]:
    """Where a step's numbers lie in float32 and in bfloat16."""
    return (
        builder.add(sums_at, builder.mul(INT64(4 * ROW_COLUMNS), loop.index)),
        builder.add(y_at, builder.mul(INT64(2 * ROW_COLUMNS), loop.index)),
    )
