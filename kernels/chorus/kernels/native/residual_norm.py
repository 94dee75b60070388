"""`residual_norm` on a CPU: a work item is a row, whose sum stays in float32 beside it until it is normed.

h    = residual + x, rounded, written back      -> float32 [N], in the first level of the cache
out  = h / RMS(h) * weight (+ bias)             the row's own vectors where it has a slot
"""
# numba compiles what it sees, whatever the types say.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import math
from functools import cache

import numba
import numpy as np
import torch
from numba import carray
from torch import Tensor

from chorus.kernels.native.numbers import HELD_AS, INLINE, float_of, narrow, pointer, take_ticket, wide
from chorus.kernels.native.team import EDITION, Compiled
from chorus.kernels.types import Norm

# A second thread for so many numbers: 5 us of work, what it takes to have it.
_NUMBERS_OF_A_THREAD = 65536
KINDS = {"rms": 0, "rms_plus_one": 1, "layer": 2}


def residual_norm(out: Tensor, residual: Tensor, x: Tensor | None, norm: Norm, slots: Tensor | None) -> None:
    """Writes norm(residual + x) to `out`, [T, N], contiguous; `residual` becomes the sum.

    All of one dtype of two bytes, rows contiguous; slots, int32, of the first rows, each within the norm's pools, -1
    where a row has the base's vectors, as rows after them do. That all this fits is the caller's to check.
    """
    rows, width = out.shape
    pooled = (norm.weights, norm.biases, slots) if slots is not None else (None, None, None)
    _kernel(HELD_AS[out.dtype])(
        1 + rows * width // _NUMBERS_OF_A_THREAD,
        *(out, residual, x, norm.weight, norm.bias, *pooled, 0 if slots is None else len(slots), rows, width),
        *(residual.stride(0), 0 if x is None else x.stride(0), KINDS[norm.kind], norm.eps),
    )


def prepare(dtype: torch.dtype) -> None:
    """Compiles now what the first call would wait for."""
    _kernel(HELD_AS[dtype])


@cache
def _kernel(held: type) -> Compiled:
    edition, size = EDITION, np.dtype(held).itemsize

    def residual_norm(arguments):
        a = carray(arguments, (17,))
        out_at, residual_at, x_at, weight_at, bias_at, weights_at, biases_at, slots_at = (
            a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9],
        )  # fmt: skip
        with_slot, rows, width, residual_stride, x_stride = a[10], a[11], a[12], a[13], a[14]
        kind, eps = a[15], float_of(numba.uint32(a[16]))
        slots = carray(pointer(slots_at), (with_slot,), np.int32)
        h = np.empty(width, np.float32)
        while edition == a[1]:
            row = take_ticket(arguments)
            if row >= rows:
                break
            residual = carray(pointer(residual_at + size * row * residual_stride), (width,), held)
            _add(h, residual, carray(pointer(x_at + size * row * x_stride), (width if x_at else 0,), held))
            if kind == 2:
                _center(h)
            scale = _over_rms(h, eps)
            own_weight, own_bias = weight_at, bias_at
            if row < with_slot and slots[row] >= 0:
                vector = size * slots[row] * width
                own_weight = weights_at + vector
                own_bias = biases_at + vector if biases_at else 0
            weight = carray(pointer(own_weight), (width,), held)
            bias = carray(pointer(own_bias), (width if own_bias else 0,), held)
            _write(carray(pointer(out_at + size * row * width), (width,), held), h, scale, kind, weight, bias)

    return Compiled(residual_norm)


@numba.njit(**INLINE)
def _add(h, residual, x):
    """residual += x, rounded, where there is an x; h is the sum."""
    if len(x) == 0:
        for i in range(len(h)):
            h[i] = wide(residual[i])
        return
    for i in range(len(h)):
        total = narrow(wide(residual[i]) + wide(x[i]), residual[i])
        residual[i] = total
        h[i] = wide(total)


@numba.njit(**INLINE)
def _center(h):
    total = np.float32(0)
    for i in range(len(h)):
        total += h[i]
    mean = total / np.float32(len(h))
    for i in range(len(h)):
        h[i] -= mean


@numba.njit(**INLINE)
def _over_rms(h, eps):
    """1 / sqrt(the mean square + eps)."""
    total = np.float32(0)
    for i in range(len(h)):
        total += h[i] * h[i]
    return np.float32(1) / np.float32(math.sqrt(total / np.float32(len(h)) + eps))


@numba.njit(**INLINE)
def _write(out, h, scale, kind, weight, bias):
    """Rounded as transformers does: Llama's norm before and after its weight, the others once."""
    if kind == 0:
        for i in range(len(h)):
            out[i] = narrow(wide(narrow(h[i] * scale, out[i])) * wide(weight[i]), out[i])
    elif kind == 1:
        for i in range(len(h)):
            out[i] = narrow(h[i] * scale * (np.float32(1) + wide(weight[i])), out[i])
    elif len(bias):
        for i in range(len(h)):
            out[i] = narrow(h[i] * scale * wide(weight[i]) + wide(bias[i]), out[i])
    else:
        for i in range(len(h)):
            out[i] = narrow(h[i] * scale * wide(weight[i]), out[i])
