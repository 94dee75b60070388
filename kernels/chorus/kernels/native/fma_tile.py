"""A few rows of x times 16 columns of a packed weight in bfloat16, for CPUs that do not multiply such numbers.

    for each pair of K             w: 2 vectors, of 8 columns and 2 numbers each, widened: the lower halves, the upper
        for each of up to 6 rows   x: its 2 numbers, float32, one after the other in every lane
            sums += x w            a fused multiply-add of 8 float32

A bfloat16 is the upper half of a float32, so two neighbours in a lane are widened by a shift and by a mask. Six rows
are 12 sums; with 2 vectors of weights, one of x and the mask they fill the 16 registers of AVX2.
"""
# numba's decorators have no types.
# mypy: disable-error-code="untyped-decorator"

from itertools import product
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from chorus.kernels.native.dot_tile import PANEL
from chorus.kernels.native.numbers import ask_for
from chorus.kernels.native.vectors import INT64, load, store

ROWS, COLUMNS = 6, 16
"""The most rows of a tile, and its columns."""

_VECTORS = COLUMNS // 8
_ROW_OF_SUMS, _PAIR_OF_WEIGHTS = 4 * PANEL, 4 * PANEL  # bytes
_EIGHT, _WORDS = ir.VectorType(ir.FloatType(), 8), ir.VectorType(ir.IntType(32), 8)


@intrinsic(prefer_literal=True)
def fma_tile(
    typing: Any, rows: Any, x_at: Any, x_stride: Any, w_at: Any, pairs: Any, sums_at: Any, ahead_at: Any, ahead: Any
) -> Any:
    """sums [rows, 16], float32 += x [rows, 2 pairs], float32, times w [pairs, 16, 2], bfloat16.

    `rows`, a constant, is at most 6; addresses and x's stride in bytes, all int64. Rows of w and of sums are a
    panel's, 64 columns; both are aligned to 32 bytes. Meanwhile `ahead` bytes for each pair, 64 at most, are asked for
    from `ahead_at` on.
    """
    count = rows.literal_value

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, x_at, x_stride, w_at, pairs, sums_at, ahead_at, ahead = arguments
        places = list(product(range(count), range(_VECTORS)))
        kept = {(row, v): builder.add(sums_at, INT64(_ROW_OF_SUMS * row + 32 * v)) for row, v in places}
        sums = {place: cgutils.alloca_once_value(builder, load(builder, kept[place], _EIGHT, 32)) for place in places}
        xs = [builder.add(x_at, builder.mul(x_stride, INT64(row))) for row in range(count)]
        with cgutils.for_range(builder, pairs) as loop:
            w = builder.add(w_at, builder.mul(INT64(_PAIR_OF_WEIGHTS), loop.index))
            weights = [load(builder, builder.add(w, INT64(32 * v)), _WORDS, 32) for v in range(_VECTORS)]
            ask_for(builder, builder.add(ahead_at, builder.mul(ahead, loop.index)))
            for half, widen in enumerate((_lower, _upper)):
                widened = [widen(builder, both) for both in weights]
                for row in range(count):
                    at = builder.add(xs[row], builder.mul(INT64(8), loop.index))
                    x = _in_every_lane(builder, builder.add(at, INT64(4 * half)))
                    for v in range(_VECTORS):
                        total = _multiply_add(builder, x, widened[v], builder.load(sums[row, v]))
                        builder.store(total, sums[row, v])
        for place in places:
            store(builder, builder.load(sums[place]), kept[place], 32)
        return context.get_dummy_value()

    return types.void(rows, *[types.int64] * 7), build


def _lower(builder: Any, both: Any) -> Any:
    return builder.bitcast(builder.shl(both, ir.Constant(_WORDS, [16] * 8)), _EIGHT)


def _upper(builder: Any, both: Any) -> Any:
    return builder.bitcast(builder.and_(both, ir.Constant(_WORDS, [0xFFFF0000] * 8)), _EIGHT)


def _in_every_lane(builder: Any, at: Any) -> Any:
    number = load(builder, at, ir.FloatType(), 4)
    anything = ir.Constant(_EIGHT, ir.Undefined)
    first = builder.insert_element(anything, number, ir.IntType(32)(0))
    return builder.shuffle_vector(first, anything, ir.Constant(_WORDS, [0] * 8))


def _multiply_add(builder: Any, x: Any, y: Any, sums: Any) -> Any:
    """Fused where the CPU has such an instruction."""
    kind = ir.FunctionType(_EIGHT, [_EIGHT, _EIGHT, _EIGHT])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.fmuladd.v8f32"), [x, y, sums])
