"""A head of queries, keys or values in bfloat16, in registers: rotated by its row's angles, and what is kept of it.

Halves are rotated, not neighbours. Loops over such short arrays take six times as long: before each, compiled code asks
whether what it writes is what it reads.
"""
# numba's decorators have no types.
# mypy: disable-error-code="untyped-decorator"

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from chorus.kernels.native.vectors import (
    INT64,
    LANES,
    SHORTS,
    SUMS,
    load,
    load_widened,
    multiply_add,
    narrowed,
    sound,
    store,
)
from chorus.kernels.reference import KV_LIMIT

# The bits of the largest number of bfloat16 that is kept: those past the first 16 of the limit's are cut off.
_LARGEST = int(np.float32(KV_LIMIT).view(np.uint32)) >> 16


def fits(dim: int) -> bool:
    """Whether a head of so many numbers is whole registers, and so are its halves."""
    return LANES == 16 and dim % (2 * LANES) == 0


@intrinsic(prefer_literal=True)
def turn(typing: Any, dim: Any, keeps: Any, out_at: Any, head_at: Any, cos_at: Any, sin_at: Any) -> Any:
    """out [dim], bfloat16 = a head [dim] turned by cos and sin [dim / 2], float32, rounded once; of a key, which the
    constant `keeps` says, 0 where it is not finite or too large. `dim`, a constant, `fits`."""
    size, is_key = dim.literal_value, keeps.literal_value

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, _, out_at, head_at, cos_at, sin_at = arguments
        numbers = load_widened(builder, head_at, size)
        for i in range(size // 2 // LANES):
            first, second = numbers[i], numbers[size // 2 // LANES + i]
            cos, sin = (load(builder, builder.add(at, INT64(4 * LANES * i)), SUMS, 4) for at in (cos_at, sin_at))
            turned = (
                multiply_add(builder, builder.fneg(second), sin, builder.fmul(first, cos)),
                multiply_add(builder, first, sin, builder.fmul(second, cos)),
            )
            for half, number in enumerate(turned):
                shorts = narrowed(builder, number)
                at = builder.add(out_at, INT64(size * half + 2 * LANES * i))
                store(builder, sound(builder, shorts, _LARGEST) if is_key else shorts, at, 2)
        return context.get_dummy_value()

    return types.void(dim, keeps, *[types.int64] * 4), build


@intrinsic(prefer_literal=True)
def keep(typing: Any, dim: Any, out_at: Any, head_at: Any) -> Any:
    """out [dim], bfloat16 = a head [dim], 0 where it is not finite or too large."""
    size = dim.literal_value

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, out_at, head_at = arguments
        for i in range(size // LANES):
            shorts = load(builder, builder.add(head_at, INT64(2 * LANES * i)), SHORTS, 2)
            store(builder, sound(builder, shorts, _LARGEST), builder.add(out_at, INT64(2 * LANES * i)), 2)
        return context.get_dummy_value()

    return types.void(dim, types.int64, types.int64), build
