"""`silu_mul` and `gelu_tanh_mul` on a CPU: a work item is a row (`gate`)."""
# numba compiles what it sees, whatever the types say.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from functools import cache

import numpy as np
import torch
from numba import carray
from torch import Tensor

from chorus.kernels.native.gate import gelu_tanh_mul, silu_mul
from chorus.kernels.native.numbers import HELD_AS, pointer, take_ticket
from chorus.kernels.native.team import EDITION, Compiled
from chorus.kernels.reference import GatedActivation

# A second thread for so many numbers: 5 us of work, what it takes to have it.
_NUMBERS_OF_A_THREAD = 8192


def gated_mul(out: Tensor, gate: Tensor, up: Tensor, activation: GatedActivation) -> None:
    """Writes act(gate) * up to `out`, [T, N], contiguous; all of one dtype of two bytes, rows contiguous."""
    rows, width = out.shape
    _kernel(HELD_AS[out.dtype])(
        1 + rows * width // _NUMBERS_OF_A_THREAD,
        *(out, gate, up, rows, width, gate.stride(0), up.stride(0), int(activation == "gelu_tanh")),
    )


def prepare(dtype: torch.dtype) -> None:
    """Compiles now what the first call would wait for."""
    _kernel(HELD_AS[dtype])


@cache
def _kernel(held: type) -> Compiled:
    edition, size = EDITION, np.dtype(held).itemsize

    def gated_mul(arguments):
        a = carray(arguments, (10,))
        out_at, gate_at, up_at, rows, width = a[2], a[3], a[4], a[5], a[6]
        gate_stride, up_stride, is_gelu = a[7], a[8], a[9]
        while edition == a[1]:
            row = take_ticket(arguments)
            if row >= rows:
                break
            gate = carray(pointer(gate_at + size * row * gate_stride), (width,), held)
            up = carray(pointer(up_at + size * row * up_stride), (width,), held)
            out = carray(pointer(out_at + size * row * width), (width,), held)
            if is_gelu:
                for i in range(width):
                    out[i] = gelu_tanh_mul(gate[i], up[i])
            else:
                for i in range(width):
                    out[i] = silu_mul(gate[i], up[i])

    return Compiled(gated_mul)
