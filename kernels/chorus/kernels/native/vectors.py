"""Vectors of a CPU in what LLVM is told: 16 sums of float32, 32 numbers of bfloat16, as AVX512_BF16 has them.

Where a CPU has no products of bfloat16, numbers are widened in registers, the lower and the upper of each lane; where
it has no vectors of that width, LLVM makes two of one.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils, config

INT64 = ir.IntType(64)
_INT32, _INT16 = ir.IntType(32), ir.IntType(16)


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


SUMS = ir.VectorType(ir.FloatType(), 16)
PAIRS = ir.VectorType(_BFloat(), 32)
_WORDS, _SHORTS, _HALF = ir.VectorType(_INT32, 16), ir.VectorType(_INT16, 16), ir.VectorType(_BFloat(), 16)


def cpu_has_them() -> bool:
    """Whether numba compiles for a CPU that has the instructions, and not AMX, for which oneDNN knows a better way."""
    return cpu_has("avx512bf16") and not cpu_has("amx-bf16")


@cache
def cpu_has(feature: str) -> bool:
    """Whether numba compiles for a CPU that has what LLVM calls by this name."""
    if config.CPU_NAME or config.CPU_FEATURES or not config.ENABLE_AVX:  # for another one, or for less of it
        return False
    return bool(binding.get_host_cpu_features().get(feature))


def load(builder: Any, at: Any, kind: Any, align: int) -> Any:
    return builder.load(builder.inttoptr(at, kind.as_pointer()), align=align)


def store(builder: Any, value: Any, at: Any, align: int) -> None:
    builder.store(value, builder.inttoptr(at, value.type.as_pointer()), align=align)


def load_half(builder: Any, at: Any) -> Any:
    """16 numbers of bfloat16, and 16 zeros."""
    numbers = load(builder, at, _SHORTS, 2)
    zeros = ir.Constant(_SHORTS, [0] * 16)
    lanes = ir.Constant(ir.VectorType(_INT32, 32), list(range(32)))
    return builder.bitcast(builder.shuffle_vector(numbers, zeros, lanes), PAIRS)


def pair_in_every_lane(builder: Any, at: Any) -> Any:
    """The two numbers of bfloat16 at an address, 16 times."""
    return builder.bitcast(_splat(builder, load(builder, at, _INT32, 2), _WORDS), PAIRS)


def float_in_every_lane(builder: Any, at: Any) -> Any:
    return _splat(builder, load(builder, at, ir.FloatType(), 4), SUMS)


def dot(builder: Any, sums: Any, x: Any, w: Any) -> Any:
    """sums plus the products of 32 numbers, two neighbours to a lane: `vdpbf16ps`, where there is such a thing."""
    if cpu_has("avx512bf16"):
        kind = ir.FunctionType(SUMS, [SUMS, PAIRS, PAIRS])
        return builder.call(_function(builder, kind, "llvm.x86.avx512bf16.dpbf16ps.512"), [sums, x, w])
    sums = multiply_add(builder, lower(builder, x), lower(builder, w), sums)
    return multiply_add(builder, upper(builder, x), upper(builder, w), sums)


def lower(builder: Any, pairs: Any) -> Any:
    """Of each lane's two numbers of bfloat16 the first, as float32: its bits are the upper half of that."""
    words = builder.bitcast(pairs, _WORDS)
    return builder.bitcast(builder.shl(words, _in_all_words(16)), SUMS)


def upper(builder: Any, pairs: Any) -> Any:
    words = builder.bitcast(pairs, _WORDS)
    return builder.bitcast(builder.and_(words, _in_all_words(0xFFFF0000)), SUMS)


def multiply_add(builder: Any, x: Any, y: Any, sums: Any) -> Any:
    kind = ir.FunctionType(SUMS, [SUMS, SUMS, SUMS])
    return builder.call(_function(builder, kind, "llvm.fma.v16f32"), [x, y, sums])


def sum_of_lanes(builder: Any, sums: Any) -> Any:
    kind = ir.FunctionType(ir.FloatType(), [ir.FloatType(), SUMS])
    add = _function(builder, kind, "llvm.vector.reduce.fadd.v16f32")
    return builder.call(add, [ir.Constant(ir.FloatType(), 0.0), sums], fastmath=("reassoc",))


def sums_of_lanes(builder: Any, sums: Sequence[Any]) -> Any:
    """Of 16 vectors a vector: of each the sum of its lanes.

    Vectors are added in pairs, halves of one beside halves of the other: 16 of 16 lanes, 8 of 8 lanes each of two, ..
    """
    width = 8
    while width:
        first, second = _halves(width)
        apart = len(sums) // 2
        sums = [
            builder.fadd(builder.shuffle_vector(x, y, first), builder.shuffle_vector(x, y, second), flags=("reassoc",))
            for x, y in zip(sums[:apart], sums[apart:], strict=True)
        ]
        width //= 2
    return sums[0]


def _halves(width: int) -> tuple[ir.Constant, ir.Constant]:
    """Of two vectors' lanes, in parts of twice the width, a part of one after a part of the other: the first halves of
    all, and the second halves."""
    firsts = [part + lane for at in range(0, 16, 2 * width) for part in (at, 16 + at) for lane in range(width)]
    return ir.Constant(_WORDS, firsts), ir.Constant(_WORDS, [lane + width for lane in firsts])


def scaled(builder: Any, sums: Any, factor: Any) -> Any:
    """All lanes times a float32."""
    return builder.fmul(sums, _splat(builder, factor, SUMS))


def load_widened(builder: Any, at: Any) -> Any:
    """16 numbers of bfloat16 as float32."""
    words = builder.zext(load(builder, at, _SHORTS, 2), _WORDS)
    return builder.bitcast(builder.shl(words, _in_all_words(16)), SUMS)


def store_narrowed(builder: Any, sums: Any, at: Any) -> None:
    """Rounds to bfloat16, to nearest even, on a CPU with AVX512_BF16."""
    kind = ir.FunctionType(_HALF, [SUMS])
    rounded = builder.call(_function(builder, kind, "llvm.x86.avx512bf16.cvtneps2bf16.512"), [sums])
    store(builder, rounded, at, 2)


def at_most(builder: Any, number: int, last: Any) -> Any:
    """The smaller of the two, int64."""
    return builder.select(builder.icmp_signed("<", INT64(number), last), INT64(number), last)


def _splat(builder: Any, value: Any, kind: Any) -> Any:
    anything = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(anything, value, _INT32(0))
    return builder.shuffle_vector(first, anything, ir.Constant(_WORDS, [0] * 16))


def _in_all_words(number: int) -> ir.Constant:
    return ir.Constant(_WORDS, [number] * 16)


def _function(builder: Any, kind: Any, name: str) -> Any:
    return cgutils.get_or_insert_function(builder.module, kind, name)
