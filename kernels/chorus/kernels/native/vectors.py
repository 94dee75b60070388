"""Vectors of a CPU in what LLVM is told: `LANES` sums of float32, and twice as many numbers of bfloat16.

Where a CPU has no products of bfloat16, numbers are widened in registers, the lower and the upper of each lane.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils, config

from chorus.kernels.native.numbers import QUIET_NAN

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


# 2^f for |f| <= 1/2: what f^5 down to 1 are multiplied by, so that the largest relative error is least.
_EXP2 = (1.3269701e-3, 9.6754842e-3, 5.5507343e-2, 2.4022122e-1, 6.9314694e-1, 1.0000001)


@cache
def cpu_has(feature: str) -> bool:
    """Whether numba compiles for a CPU that has what LLVM calls by this name."""
    if config.CPU_NAME or config.CPU_FEATURES or not config.ENABLE_AVX:  # for another one, or for less of it
        return False
    return bool(binding.get_host_cpu_features().get(feature))


@cache
def cpu_is(name: str) -> bool:
    """Whether this is the CPU that LLVM calls by this name, and numba is not told to compile for another."""
    return not config.CPU_NAME and binding.get_host_cpu_name() == name


LANES = 16 if cpu_has("avx512f") else 8
"""Of float32 in a register: there are 32 registers of 16 or 16 of 8. LLVM makes two of one where they are narrower."""

SUMS = ir.VectorType(ir.FloatType(), LANES)
PAIRS = ir.VectorType(_BFloat(), 2 * LANES)
WORDS, SHORTS, _HALF = ir.VectorType(_INT32, LANES), ir.VectorType(_INT16, LANES), ir.VectorType(_BFloat(), LANES)


def load(builder: Any, at: Any, kind: Any, align: int) -> Any:
    return builder.load(builder.inttoptr(at, kind.as_pointer()), align=align)


def store(builder: Any, value: Any, at: Any, align: int) -> None:
    builder.store(value, builder.inttoptr(at, value.type.as_pointer()), align=align)


def load_pairs(builder: Any, at: Any, count: int) -> list[Any]:
    """So many numbers of bfloat16, 2 `LANES` to a vector; the last ends with zeros if half of them are left."""
    each = 2 * LANES
    whole = [load(builder, builder.add(at, INT64(2 * each * i)), PAIRS, 2) for i in range(count // each)]
    return whole if count % each == 0 else [*whole, _load_half(builder, builder.add(at, INT64(2 * (count - LANES))))]


def _load_half(builder: Any, at: Any) -> Any:
    """`LANES` numbers, and as many zeros."""
    numbers = load(builder, at, SHORTS, 2)
    zeros = ir.Constant(SHORTS, [0] * LANES)
    lanes = ir.Constant(ir.VectorType(_INT32, 2 * LANES), list(range(2 * LANES)))
    return builder.bitcast(builder.shuffle_vector(numbers, zeros, lanes), PAIRS)


def pair_in_every_lane(builder: Any, at: Any) -> Any:
    """The two numbers of bfloat16 at an address, `LANES` times."""
    return builder.bitcast(_splat(builder, load(builder, at, _INT32, 2), WORDS), PAIRS)


def float_in_every_lane(builder: Any, at: Any) -> Any:
    return _splat(builder, load(builder, at, ir.FloatType(), 4), SUMS)


def dot(builder: Any, sums: Any, x: Any, w: Any) -> Any:
    """sums plus the products of numbers, two neighbours to a lane: `vdpbf16ps`, where there is such a thing."""
    if cpu_has("avx512bf16"):
        kind = ir.FunctionType(SUMS, [SUMS, PAIRS, PAIRS])
        return builder.call(_function(builder, kind, "llvm.x86.avx512bf16.dpbf16ps.512"), [sums, x, w])
    sums = multiply_add(builder, lower(builder, x), lower(builder, w), sums)
    return multiply_add(builder, upper(builder, x), upper(builder, w), sums)


def lower(builder: Any, pairs: Any) -> Any:
    """Of each lane's two numbers of bfloat16 the first, as float32: its bits are the upper half of that."""
    words = builder.bitcast(pairs, WORDS)
    return builder.bitcast(builder.shl(words, _in_all_words(16)), SUMS)


def upper(builder: Any, pairs: Any) -> Any:
    words = builder.bitcast(pairs, WORDS)
    return builder.bitcast(builder.and_(words, _in_all_words(0xFFFF0000)), SUMS)


def multiply_add(builder: Any, x: Any, y: Any, sums: Any) -> Any:
    """Fused where the CPU has such an instruction."""
    kind = ir.FunctionType(SUMS, [SUMS, SUMS, SUMS])
    return builder.call(_function(builder, kind, f"llvm.fmuladd.v{LANES}f32"), [x, y, sums])


def sum_of_lanes(builder: Any, sums: Any) -> Any:
    kind = ir.FunctionType(ir.FloatType(), [ir.FloatType(), SUMS])
    add = _function(builder, kind, f"llvm.vector.reduce.fadd.v{LANES}f32")
    return builder.call(add, [ir.Constant(ir.FloatType(), 0.0), sums], fastmath=("reassoc",))


def sums_of_lanes(builder: Any, sums: Sequence[Any]) -> Any:
    """Of `LANES` vectors a vector: of each the sum of its lanes.

    Vectors are added in pairs, halves of one beside halves of the other: 16 of 16 lanes, 8 of 8 lanes each of two, ..
    """
    width = LANES // 2
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
    firsts = [part + lane for at in range(0, LANES, 2 * width) for part in (at, LANES + at) for lane in range(width)]
    return ir.Constant(WORDS, firsts), ir.Constant(WORDS, [lane + width for lane in firsts])


def transposed(builder: Any, rows: Sequence[Any]) -> list[Any]:
    """Of `LANES` vectors of words their columns: blocks off the diagonal change places, half as wide each time."""
    columns, width = list(rows), LANES // 2
    while width:
        lanes = range(LANES)
        upper = ir.Constant(WORDS, [lane if not lane & width else LANES + lane - width for lane in lanes])
        lower = ir.Constant(WORDS, [lane + width if not lane & width else LANES + lane for lane in lanes])
        for i in (i for i in lanes if not i & width):
            above, below = columns[i], columns[i + width]
            columns[i] = builder.shuffle_vector(above, below, upper)
            columns[i + width] = builder.shuffle_vector(above, below, lower)
        width //= 2
    return columns


def some_lanes(builder: Any, vector: Any, first: int, count: int) -> Any:
    """`count` neighbours of its lanes."""
    if count == LANES:
        return vector
    lanes = ir.Constant(ir.VectorType(_INT32, count), list(range(first, first + count)))
    return builder.shuffle_vector(vector, vector, lanes)


def higher(builder: Any, x: Any, y: Any) -> Any:
    """Of each lane the higher number; of NaN y's."""
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


def highest_lane(builder: Any, vector: Any) -> Any:
    """Of numbers that are not NaN."""
    width = LANES // 2
    while width:  # LLVM's own way, `vector.reduce.fmax`, looks for NaN at each of these steps
        across = ir.Constant(WORDS, [lane ^ width for lane in range(LANES)])
        vector = higher(builder, vector, builder.shuffle_vector(vector, vector, across))
        width //= 2
    return builder.extract_element(vector, _INT32(0))


def exp2(builder: Any, x: Any) -> Any:
    """2^x of each lane, within 2e-7 of it; 0 of what is far below, -inf too, and NaN of NaN. With AVX512F."""
    kind, lowest = ir.FunctionType(SUMS, [SUMS]), ir.Constant(SUMS, [-200.0] * LANES)
    x = builder.select(builder.fcmp_ordered("<", x, lowest), lowest, x)
    whole = builder.call(_function(builder, kind, f"llvm.rint.v{LANES}f32"), [x])
    part = builder.fsub(x, whole)
    power = ir.Constant(SUMS, [_EXP2[0]] * LANES)
    for factor in _EXP2[1:]:
        power = multiply_add(builder, power, part, ir.Constant(SUMS, [factor] * LANES))
    all_lanes, rounding = ir.IntType(16), _INT32
    kind = ir.FunctionType(SUMS, [SUMS, SUMS, SUMS, all_lanes, rounding])
    scale = _function(builder, kind, "llvm.x86.avx512.mask.scalef.ps.512")
    return builder.call(scale, [power, whole, power, all_lanes(-1), rounding(4)])


def lanes_between(builder: Any, first: int, begin: Any, end: Any) -> Any:
    """Of lanes that are numbers `first` and on, which are from `begin` on, int64, and before `end`."""
    numbers = ir.Constant(WORDS, list(range(first, first + LANES)))
    begin, end = (_splat(builder, builder.trunc(number, _INT32), WORDS) for number in (begin, end))
    from_begin = builder.icmp_signed(">=", numbers, begin)
    return builder.and_(from_begin, builder.icmp_signed("<", numbers, end))


def in_every_lane(builder: Any, number: Any) -> Any:
    return _splat(builder, number, SUMS)


def scaled(builder: Any, sums: Any, factor: Any) -> Any:
    """All lanes times a float32."""
    return builder.fmul(sums, in_every_lane(builder, factor))


def load_widened(builder: Any, at: Any, count: int) -> list[Any]:
    """So many numbers of bfloat16 as float32, 16 or a multiple of that, in an order of their own, which only
    `store_narrowed` needs to know: of narrow vectors the lower of each lane's two, then the upper, as no shuffle is
    needed for that; else as they lie."""
    if LANES == 8:
        lanes = [load(builder, builder.add(at, INT64(32 * i)), PAIRS, 2) for i in range(count // 16)]
        return [half(builder, pairs) for pairs in lanes for half in (lower, upper)]
    each = [load(builder, builder.add(at, INT64(2 * LANES * i)), SHORTS, 2) for i in range(count // LANES)]
    words = [builder.shl(builder.zext(shorts, WORDS), _in_all_words(16)) for shorts in each]
    return [builder.bitcast(word, SUMS) for word in words]


def store_narrowed(builder: Any, numbers: Sequence[Any], at: Any) -> None:
    """Rounds to bfloat16, to nearest even, what is in the order of `load_widened`; NaN stays NaN."""
    if LANES == 8:
        for i in range(0, len(numbers), 2):
            low, high = (_rounded(builder, number) for number in numbers[i : i + 2])
            words = builder.or_(builder.lshr(low, _in_all_words(16)), builder.and_(high, _in_all_words(0xFFFF0000)))
            store(builder, words, builder.add(at, INT64(16 * i)), 2)
        return
    for i, number in enumerate(numbers):
        store(builder, narrowed(builder, number), builder.add(at, INT64(2 * LANES * i)), 2)


def narrowed(builder: Any, numbers: Any) -> Any:
    """`LANES` numbers rounded to bfloat16, to nearest even, their bits; NaN stays NaN."""
    if cpu_has("avx512bf16"):
        kind = ir.FunctionType(_HALF, [SUMS])
        half = builder.call(_function(builder, kind, "llvm.x86.avx512bf16.cvtneps2bf16.512"), [numbers])
        return builder.bitcast(half, SHORTS)
    return builder.trunc(builder.lshr(_rounded(builder, numbers), _in_all_words(16)), SHORTS)


def sound(builder: Any, shorts: Any, largest: int) -> Any:
    """Bits of bfloat16, 0 in the place of NaN and of what is further from 0 than `largest`, the bits of a number."""
    size = builder.and_(shorts, ir.Constant(SHORTS, [0x7FFF] * LANES))
    keeps = builder.icmp_signed("<=", size, ir.Constant(SHORTS, [largest] * LANES))
    return builder.select(keeps, shorts, ir.Constant(SHORTS, [0] * LANES))


def _rounded(builder: Any, numbers: Any) -> Any:
    """Words whose upper halves are the numbers in bfloat16."""
    words = builder.bitcast(numbers, WORDS)
    odd = builder.and_(builder.lshr(words, _in_all_words(16)), _in_all_words(1))
    up = builder.add(builder.add(words, odd), _in_all_words(0x7FFF))
    return builder.select(builder.fcmp_unordered("uno", numbers, numbers), _in_all_words(QUIET_NAN << 16), up)


def at_most(builder: Any, number: int, last: Any) -> Any:
    """The smaller of the two, int64."""
    return builder.select(builder.icmp_signed("<", INT64(number), last), INT64(number), last)


def _splat(builder: Any, value: Any, kind: Any) -> Any:
    anything = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(anything, value, _INT32(0))
    return builder.shuffle_vector(first, anything, ir.Constant(WORDS, [0] * LANES))


def _in_all_words(number: int) -> ir.Constant:
    return ir.Constant(WORDS, [number] * LANES)


def _function(builder: Any, kind: Any, name: str) -> Any:
    return cgutils.get_or_insert_function(builder.module, kind, name)
