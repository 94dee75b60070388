"""`likeliest` on a CPU: a work item is a row, read once.

bits of a float  -> an integer in the order of the numbers: larger for larger ones, past infinity's for NaN
each block       -> its largest and its smallest integer, 32 at a time
the best block   -> the first place of its largest, looked for in the first level of the cache

A loop over floats that must not pass over NaN does not become vectors; torch's takes 4 to 10 times as long.
"""
# numba compiles what it sees, whatever the types say.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from numba import carray
from numba.extending import intrinsic
from torch import Tensor

from chorus.kernels.native.numbers import INLINE, pointer, take_ticket
from chorus.kernels.native.team import EDITION, Compiled

_BLOCK = 512
# A second thread for so many numbers: 5 us of work, what it takes to have it.
_NUMBERS_OF_A_THREAD = 65536
_INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}


def likeliest(out: Tensor, logits: Tensor) -> None:
    """Writes to `out` [S], int64, contiguous, for each row of logits [S, V] what `reference.likeliest` gives.

    A row's numbers lie side by side, at least one.
    """
    rows, width = logits.shape
    kernel = _kernel(logits.dtype)
    kernel(min(rows, 1 + rows * width // _NUMBERS_OF_A_THREAD), out, logits, rows, width, logits.stride(0))


def prepare(dtype: torch.dtype) -> None:
    """Compiles now what the first call would wait for."""
    _kernel(dtype)


@cache
def _kernel(dtype: torch.dtype) -> Compiled:
    edition, size, infinity = EDITION, dtype.itemsize, _INFINITY[dtype]
    bits = np.int16 if size == 2 else np.int32

    def likeliest(arguments):
        a = carray(arguments, (7,))
        rows, width, stride = a[4], a[5], a[6]
        out = carray(pointer(a[2]), (rows,), np.int64)
        while edition == a[1]:
            row = take_ticket(arguments)
            if row >= rows:
                break
            numbers = carray(pointer(a[3] + size * row * stride), (width,), bits)
            best, at, lowest = bits(-infinity - 1), 0, bits(0)
            for first in range(0, width, _BLOCK):
                largest, smallest = _ends(numbers[first : first + _BLOCK], bits(-infinity - 1), bits(0))
                if largest > best:
                    best, at = largest, first
                lowest = min(lowest, smallest)
            out[row] = -1
            if -infinity < best < infinity and lowest >= -infinity:
                while in_order(numbers[at]) != best:
                    at += 1
                out[row] = at

    return Compiled(likeliest)


@numba.njit(**INLINE)
def _ends(numbers, largest, smallest):
    """The largest and the smallest of these and of two others."""
    for i in range(len(numbers)):
        number = in_order(numbers[i])
        largest = number if number > largest else largest
        smallest = number if number < smallest else smallest
    return largest, smallest


@intrinsic
def in_order(typing: Any, bits: Any) -> Any:
    """A float's bits as an integer that is larger for a larger number; 0 for -0, too."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (number,) = arguments
        width = number.type.width
        sign = builder.ashr(number, number.type(width - 1))
        size = builder.and_(number, number.type(2 ** (width - 1) - 1))
        return builder.sub(builder.xor(size, sign), sign)

    return bits(bits), build
