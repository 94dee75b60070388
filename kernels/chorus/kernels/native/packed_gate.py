"""The gate of a feed-forward on a CPU, out of one packed weight: act(x Wg^T + bg) * (x Wu^T + bu) of few rows.

A work item is a panel of the gate's columns and the panel of up's beside it. Apart, 16 rows of 2 x 2816 columns are
written by the linear, 180 KB, and read again by another thread, which takes longer than to compute what comes of them:
47 us of a layer's 1.2 ms on a CPU with AMX, where 13 are computed.
"""
# numba compiles what it sees, whatever the types say.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from functools import cache

import numba
import numpy as np
import torch
from numba import carray
from torch import Tensor

from chorus.kernels.native import packed_linear
from chorus.kernels.native.gate import gelu_tanh_mul, silu_mul
from chorus.kernels.native.numbers import INLINE, add_numbers, lines, narrow, pointer, take_ticket
from chorus.kernels.native.packed_linear import MOST_ROWS, PANEL, multiply
from chorus.kernels.native.team import EDITION, Compiled
from chorus.kernels.reference import GatedActivation


def packed_gate(y: Tensor, x: Tensor, weights_at: int, bias: Tensor | None, activation: GatedActivation) -> None:
    """y [T, N] = act(gate) * up, gate and up [T, 2 N] = x W^T + bias, rounded as if they were written.

    As `packed_linear`; `PANEL` divides N.
    """
    rows, n = y.shape
    items, is_gelu = n // PANEL, int(activation == "gelu_tanh")
    _kernel()(items, items, y, y.stride(0), x, x.stride(0), x.shape[1], rows, weights_at, bias, is_gelu)


def prepare(dtype: torch.dtype) -> None:
    """Compiles now what the first call would wait for."""
    if dtype == torch.bfloat16 and packed_linear.runs():
        _kernel()


@cache
def _kernel() -> Compiled:
    edition, columns = EDITION, PANEL  # as in `packed_linear`

    def packed_gate(arguments):
        a = carray(arguments, (12,))
        panels, y_at, y_stride, x_at, x_stride, k, rows = a[2], a[3], a[4], a[5], a[6], a[7], a[8]
        weights_at, bias_at, is_gelu = a[9], a[10], a[11]
        both = lines(2 * MOST_ROWS * PANEL).reshape((2, MOST_ROWS, PANEL))
        gates, ups = both[0], both[1]
        size = 4 * columns * ((k + 31) // 32 * 16)
        following = take_ticket(arguments)
        while edition == a[1]:
            panel = following
            if panel >= panels:
                break
            following = take_ticket(arguments)
            gate_at, up_at = weights_at + size * panel, weights_at + size * (panels + panel)
            after = weights_at + size * min(following, panels - 1)
            multiply(gates, x_at, 2 * x_stride, gate_at, rows, k // 2, up_at)
            multiply(ups, x_at, 2 * x_stride, up_at, rows, k // 2, after)
            for row in range(rows):
                if bias_at:
                    add_numbers(gates[row], bias_at + 2 * PANEL * panel, np.uint16)
                    add_numbers(ups[row], bias_at + 2 * PANEL * (panels + panel), np.uint16)
                y = carray(pointer(y_at + 2 * (row * y_stride + PANEL * panel)), (PANEL,), np.uint16)
                _write(y, gates[row], ups[row], is_gelu)

    return Compiled(packed_gate)


@numba.njit(**INLINE)
def _write(y, gates, ups, is_gelu):
    if is_gelu:
        for j in range(PANEL):
            y[j] = gelu_tanh_mul(narrow(gates[j], y[j]), narrow(ups[j], y[j]))
    else:
        for j in range(PANEL):
            y[j] = silu_mul(narrow(gates[j], y[j]), narrow(ups[j], y[j]))
