"""Eight rows of x times 32 columns of a packed weight: the innermost loop of a linear, all of it in registers.

    for each pair of K             w: 2 vectors, of 16 columns and 2 numbers each
        for each of the 8 rows     x: its 2 numbers, in every lane
            sums += x w            `vdpbf16ps`: two products of bfloat16 a lane, added to a float32

That is 16 sums, 2 vectors of weights and one of x at a time, of 32 registers. A core of Zen 4 begins one `vdpbf16ps` a
cycle; 16 of them need 10 loads, for which it takes 5 cycles, so they run at its rate while weights come in time.
"""
# numba's decorators have no types.
# mypy: disable-error-code="untyped-decorator"

from functools import partial
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
    PAIRS,
    SUMS,
    at_most,
    cpu_is,
    dot,
    load,
    pair_in_every_lane,
    store,
)

ROWS, COLUMNS = 8, 32
PANEL = 64
"""Columns that lie beside each other in the packed weight: of each pair of K the two numbers of 64 columns in turn."""
BLOCK = 64
"""Pairs of K that are best multiplied at a time: 16 KiB of weights."""

# Whether weights are fetched past the caches. The base makes 1.14 times the tokens/s so on Zen 5, and 0.87 on Zen 4.
_PAST_THE_CACHES = cpu_is("znver5")
_VECTORS = COLUMNS // 16
_ROW_OF_SUMS, _PAIR_OF_WEIGHTS = 4 * PANEL, 4 * PANEL  # bytes


@intrinsic
def tile(
    typing: Any, x_at: Any, x_stride: Any, last: Any, w_at: Any, pairs: Any, sums_at: Any, ahead_at: Any, ahead: Any
) -> Any:
    """sums [8, 32] += x [8, 2 pairs] times w [pairs, 32, 2]; addresses and x's stride in bytes, all int64.

    Rows of w and of sums are a panel's, 64 columns; both are aligned to 64 bytes. In the place of rows past number
    `last` that row is computed again, so that nothing is read outside. Meanwhile `ahead` bytes for each pair, 128 at
    most, are asked for from `ahead_at` on.
    """
    return types.void(*[types.int64] * 8), _build


@intrinsic
def tile_anew(
    typing: Any, x_at: Any, x_stride: Any, last: Any, w_at: Any, pairs: Any, sums_at: Any, ahead_at: Any, ahead: Any
) -> Any:
    """`tile` whose sums begin at 0, whatever is there."""
    return types.void(*[types.int64] * 8), partial(_build, anew=True)


def _build(context: Any, builder: Any, signature: Any, arguments: Any, *, anew: bool = False) -> Any:
    x_at, x_stride, last, w_at, pairs, sums_at, ahead_at, ahead = arguments
    places = list(product(range(ROWS), range(_VECTORS)))
    kept = {(row, v): builder.add(sums_at, INT64(_ROW_OF_SUMS * row + 64 * v)) for row, v in places}
    zeros = ir.Constant(SUMS, [0.0] * LANES)
    before = {place: zeros if anew else load(builder, at, SUMS, 64) for place, at in kept.items()}
    sums = {place: cgutils.alloca_once_value(builder, number) for place, number in before.items()}
    rows = [builder.add(x_at, builder.mul(x_stride, at_most(builder, row, last))) for row in range(ROWS)]
    with cgutils.for_range(builder, pairs) as loop:
        w = builder.add(w_at, builder.mul(INT64(_PAIR_OF_WEIGHTS), loop.index))
        weights = [load(builder, builder.add(w, INT64(64 * v)), PAIRS, 64) for v in range(_VECTORS)]
        asked = builder.add(ahead_at, builder.mul(ahead, loop.index))
        ask_for(builder, asked, once=_PAST_THE_CACHES)
        ask_for(builder, builder.add(asked, builder.lshr(ahead, INT64(1))), once=_PAST_THE_CACHES)
        for row in range(ROWS):
            x = pair_in_every_lane(builder, builder.add(rows[row], builder.mul(INT64(4), loop.index)))
            for v in range(_VECTORS):
                builder.store(dot(builder, builder.load(sums[row, v]), x, weights[v]), sums[row, v])
    for place in places:
        store(builder, builder.load(sums[place]), kept[place], 64)
    return context.get_dummy_value()
