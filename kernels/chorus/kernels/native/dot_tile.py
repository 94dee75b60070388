"""Eight rows of x times 32 columns of a packed weight: the innermost loop of a linear, all of it in registers.

    for each pair of K             w: 2 vectors, of 16 columns and 2 numbers each
        for each of the 8 rows     x: its 2 numbers, in every lane
            sums += x w            `vdpbf16ps`: two products of bfloat16 a lane, added to a float32

That is 16 sums, 2 vectors of weights and one of x at a time, of 32 registers. A core of Zen 4 begins one `vdpbf16ps` a
cycle; 16 of them need 10 loads, for which it takes 5 cycles, so they run at its rate while weights come in time.
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

ROWS, COLUMNS = 8, 32
PANEL = 64
"""Columns that lie beside each other in the packed weight: of each pair of K the two numbers of 64 columns in turn."""
# How many bytes ahead weights are fetched: at 16 rows on 2 cores 21 GB/s come in so, 19 of 8192 ahead, 18 of 32768.
AHEAD = 16384

_VECTORS = COLUMNS // 16
_ROW_OF_SUMS, _PAIR_OF_WEIGHTS = 4 * PANEL, 4 * PANEL  # bytes
_INT32, _INT64 = ir.IntType(32), ir.IntType(64)
_SUMS, _WORDS = ir.VectorType(ir.FloatType(), 16), ir.VectorType(_INT32, 16)


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_PAIRS = ir.VectorType(_BFloat(), 32)


@intrinsic
def dot_tile(typing: Any, x_at: Any, x_stride: Any, last: Any, w_at: Any, pairs: Any, sums_at: Any) -> Any:
    """sums [8, 32] += x [8, 2 pairs] times w [pairs, 32, 2]; addresses and x's stride in bytes, all int64.

    Rows of w and of sums are a panel's, 64 columns; both are aligned to 64 bytes. In the place of rows past number
    `last` that row is computed again, so that nothing is read outside.
    """
    return types.void(*[types.int64] * 6), _build


def _build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    x_at, x_stride, last, w_at, pairs, sums_at = arguments
    places = list(product(range(ROWS), range(_VECTORS)))
    kept = {(row, v): builder.add(sums_at, _INT64(_ROW_OF_SUMS * row + 64 * v)) for row, v in places}
    sums = {place: cgutils.alloca_once_value(builder, _load(builder, kept[place], _SUMS, 64)) for place in places}
    rows = [builder.add(x_at, builder.mul(x_stride, _at_most(builder, row, last))) for row in range(ROWS)]
    with cgutils.for_range(builder, pairs) as loop:
        w = builder.add(w_at, builder.mul(_INT64(_PAIR_OF_WEIGHTS), loop.index))
        weights = []
        for v in range(_VECTORS):
            weights.append(_load(builder, builder.add(w, _INT64(64 * v)), _PAIRS, 64))
            ask_for(builder, builder.add(w, _INT64(64 * v + AHEAD)))
        for row in range(ROWS):
            x = _in_every_lane(builder, builder.add(rows[row], builder.mul(_INT64(4), loop.index)))
            for v in range(_VECTORS):
                builder.store(_dot(builder, builder.load(sums[row, v]), x, weights[v]), sums[row, v])
    for place in places:
        builder.store(builder.load(sums[place]), builder.inttoptr(kept[place], _SUMS.as_pointer()), align=64)
    return context.get_dummy_value()


def _at_most(builder: Any, row: int, last: Any) -> Any:
    return builder.select(builder.icmp_signed("<", _INT64(row), last), _INT64(row), last)


def _load(builder: Any, at: Any, kind: Any, align: int) -> Any:
    return builder.load(builder.inttoptr(at, kind.as_pointer()), align=align)


def _in_every_lane(builder: Any, at: Any) -> Any:
    """The 32 bits at an address, 16 times."""
    anything = ir.Constant(_WORDS, ir.Undefined)
    first = builder.insert_element(anything, _load(builder, at, _INT32, 2), _INT32(0))
    return builder.bitcast(builder.shuffle_vector(first, anything, ir.Constant(_WORDS, [0] * 16)), _PAIRS)


def _dot(builder: Any, sums: Any, x: Any, w: Any) -> Any:
    kind = ir.FunctionType(_SUMS, [_SUMS, _PAIRS, _PAIRS])
    dot = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
    return builder.call(dot, [sums, x, w])
