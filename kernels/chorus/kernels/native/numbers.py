"""What kernels say of numbers: torch's dtypes as numba holds them, arrays at an address, exp.

numba knows neither bfloat16 nor float16. Their bits are held as uint16 and int16, and only `wide` and `narrow` tell
them apart, so a kernel is written once for all dtypes.
"""
# numba compiles what it sees, whatever the types say.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

HELD_AS: dict[torch.dtype, type] = {torch.bfloat16: np.uint16, torch.float16: np.int16, torch.float32: np.float32}
"""The dtypes that kernels are made for."""

# Sums may be reordered and products fused, so loops become vectors; NaN and infinities keep their meaning.
OPTIONS: dict[str, Any] = {"fastmath": {"reassoc", "contract", "nsz", "arcp"}, "error_model": "numpy"}
INLINE = OPTIONS | {"inline": "always"}
"""Of a kernel's functions, which are written out where they are called."""

QUIET_NAN = 0x7FC0
"""Of bfloat16, its bits."""


@intrinsic
def pointer(typing: Any, address: Any) -> Any:
    """An int64 as the address of something."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), build


@intrinsic
def wide(typing: Any, number: Any) -> Any:
    """A number of any held dtype as float32."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (bits,) = arguments
        if number == types.uint16:
            return builder.bitcast(builder.shl(builder.zext(bits, ir.IntType(32)), ir.IntType(32)(16)), ir.FloatType())
        if number == types.int16:
            return builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType())
        return bits

    return types.float32(number), build


@intrinsic
def narrow(typing: Any, value: Any, like: Any) -> Any:
    """float32 `value`, rounded to nearest even, in the dtype of `like`."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = arguments[0]
        if like == types.int16:
            return builder.bitcast(builder.fptrunc(value, ir.HalfType()), ir.IntType(16))
        if like == types.float32:
            return value
        word = ir.IntType(32)
        bits = builder.bitcast(value, word)
        odd = builder.and_(builder.lshr(bits, word(16)), word(1))
        rounded = builder.lshr(builder.add(builder.add(bits, odd), word(0x7FFF)), word(16))
        is_nan = builder.fcmp_unordered("uno", value, value)
        return builder.trunc(builder.select(is_nan, word(QUIET_NAN), rounded), ir.IntType(16))

    return like(types.float32, like), build


@intrinsic
def float_of(typing: Any, bits: Any) -> Any:
    """The float32 of these 32 bits."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), build


@intrinsic
def take_ticket(typing: Any, counter: Any) -> Any:
    """Adds 1 to the int64 that `counter` points at, for all threads; returns what it was."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", arguments[0], ir.IntType(64)(1), "monotonic")

    return types.int64(counter), build


def ask_for(builder: Any, address: Any, *, to_write: bool = False, once: bool = False) -> None:
    """What `prefetch` is compiled to, and `prefetch_to_write`; what is read `once` is to drive nothing out."""
    byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
    function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
    nearness = 3 if to_write else 0 if once else 2
    builder.call(function, [builder.inttoptr(address, byte), word(int(to_write)), word(nearness), word(1)])


@intrinsic
def prefetch(typing: Any, address: Any) -> Any:
    """Asks for the 64 bytes at an int64 address to come into the second level of the cache; it need not be there."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        ask_for(builder, arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), build


@intrinsic
def prefetch_to_write(typing: Any, address: Any) -> Any:
    """Asks for the 64 bytes at an int64 address as this thread's own, into the first level of the cache."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        ask_for(builder, arguments[0], to_write=True)
        return context.get_dummy_value()

    return types.void(types.int64), build


@numba.njit(**INLINE)
def lines(count):
    """So many float32 that nobody has set, from the beginning of a line of the cache on."""
    memory = np.empty(count + 16, np.float32)
    skipped = -(memory.ctypes.data // 4) % 16
    return memory[skipped : skipped + count]


@numba.njit(**INLINE)
def exp(x):
    """e^x in float32, vectorised with the loop around it, within 2 ulp; past -87.3 and 88.3 what it is there.

    Cephes' way: 2^n e^f with |f| <= ln 2 / 2, ln 2 in two parts, e^f a polynomial of the sixth degree.
    """
    bounded = x if not x < np.float32(-87.3) else np.float32(-87.3)  # a NaN is not below: it stays
    bounded = bounded if not bounded > np.float32(88.3) else np.float32(88.3)
    n = np.floor(bounded * np.float32(1.44269504) + np.float32(0.5))
    f = bounded - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4) * f + np.float32(1.3981999507e-3)
    p = p * f + np.float32(8.3334519073e-3)
    p = p * f + np.float32(4.1665795894e-2)
    p = p * f + np.float32(1.6666665459e-1)
    p = p * f + np.float32(5.0000001201e-1)
    p = p * f * f + f + np.float32(1.0)
    return p * float_of(numba.uint32((numba.int32(n) + numba.int32(127)) << numba.int32(23)))


@numba.njit(**OPTIONS)
def add_numbers(sums, at, dtype):
    """Adds to float32 sums the numbers at an address, of a held dtype."""
    numbers = carray(pointer(at), (len(sums),), dtype)
    for j in range(len(sums)):
        sums[j] += wide(numbers[j])
