"""Linears of few rows on a CPU, over weights that lie as oneDNN packed them: a work item is a panel, P columns.

    for each BLOCK pairs of K
        for each few rows, each 32 columns          sums += x w      (`dot_tile`, or `amx_tile` on a CPU with AMX)
    sums, and bias and residual where there are     rounded once     -> y

A block of a panel's weights stays in the first levels of the cache for all rows. Meanwhile the next block is fetched, a
part with each tile, so that memory is never idle: 16 rows of 2816 x 1024 take 295 us so, 330 where the first tiles
fetch all of it and a thread's next panel is only known when it begins (weights in memory, 2 cores; in the cache 220).
"""
# numba compiles what it sees, whatever the types say.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import ctypes
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
import torch.nn.functional as F
from numba import carray
from torch import Tensor

from chorus.kernels.native import amx_tile, dot_tile
from chorus.kernels.native.numbers import OPTIONS, add_numbers, lines, narrow, pointer, take_ticket
from chorus.kernels.native.team import EDITION, Compiled
from chorus.kernels.native.vectors import cpu_has

_in: Any = amx_tile if amx_tile.cpu_has_tiles() else dot_tile
ROWS, COLUMNS, PANEL, BLOCK, tile = _in.ROWS, _in.COLUMNS, _in.PANEL, _in.BLOCK, _in.tile
MOST_ROWS = 64
_PAIR = 4 * PANEL  # bytes of a pair of K


def packed_linear(y: Tensor, x: Tensor, weights_at: int, bias: Tensor | None, residual: Tensor | None) -> None:
    """y [T, N] = x W^T + bias + residual; bfloat16, T up to `MOST_ROWS`, K even, rows contiguous.

    `weights_at` is where W [N, K] lies, packed: [ceil(N / P), ceil(K / 32) * 16, P, 2], zeros past N and K.
    """
    rows, n = y.shape
    stride = 0 if residual is None else residual.stride(0)
    panels = -(-n // PANEL)
    _kernel()(panels, panels, y, y.stride(0), n, x, x.stride(0), x.shape[1], rows, weights_at, bias, residual, stride)


def runs() -> bool:
    """Whether the CPU has what the kernel is made of."""
    return cpu_has("avx512bf16")


def address_of(packed: Tensor, weight: Tensor) -> int | None:
    """Where `packed`, oneDNN's form of `weight` [N, K], has the layout that the kernel reads; None if it has not.

    Its first and its last panel are compared with the weight.
    """
    n, k = weight.shape
    panels, padded = -(-n // PANEL), -(-k // 32) * 32
    size: int = torch.ops.mkldnn._nbytes(packed)
    at: int = torch.ops.mkldnn.data_ptr(packed)
    if not runs() or weight.dtype != torch.bfloat16 or k % 2 or at % 64 or size != 2 * panels * PANEL * padded:
        return None
    lies = torch.frombuffer((ctypes.c_char * size).from_address(at), dtype=torch.bfloat16).view(panels, -1)
    for panel in {0, panels - 1}:
        rows = weight[PANEL * panel : PANEL * (panel + 1)]
        filled = F.pad(rows, (0, padded - k, 0, PANEL - len(rows))).view(PANEL, -1, 2)
        if not torch.equal(lies[panel].view(torch.int16), filled.transpose(0, 1).flatten().view(torch.int16)):
            return None
    return at


def prepare(dtype: torch.dtype) -> None:
    """Compiles now what the first call would wait for."""
    if dtype == torch.bfloat16 and runs():
        _kernel()


@cache
def _kernel() -> Compiled:
    edition, panel_columns = (
        EDITION,
        PANEL,
    )  # the tile differs with the panel, and kept code is known by what it closes over

    def packed_linear(arguments):
        a = carray(arguments, (14,))
        panels, y_at, y_stride, n, x_at, x_stride, k, rows = a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9]
        weights_at, bias_at, residual_at, residual_stride = a[10], a[11], a[12], a[13]
        sums = lines(MOST_ROWS * PANEL).reshape((MOST_ROWS, PANEL))
        padded_pairs = (k + 31) // 32 * 16
        size = _PAIR * padded_pairs
        following = take_ticket(arguments)
        while edition == a[1]:
            panel = following
            if panel >= panels:
                break
            following = take_ticket(arguments)
            first = panel * panel_columns
            columns = min(PANEL, n - first)
            after = weights_at + size * min(following, panels - 1)
            multiply(sums, x_at, 2 * x_stride, weights_at + size * panel, rows, k // 2, after)
            for row in range(rows):
                part = sums[row]
                if bias_at:
                    add_numbers(part[:columns], bias_at + 2 * first, np.uint16)
                if residual_at:
                    add_numbers(part[:columns], residual_at + 2 * (row * residual_stride + first), np.uint16)
                y = carray(pointer(y_at + 2 * (row * y_stride + first)), (columns,), np.uint16)
                for j in range(columns):
                    y[j] = narrow(part[j], y[j])

    return Compiled(packed_linear)


@numba.njit(**OPTIONS)
def multiply(sums, x_at, x_stride, w_at, rows, pairs, after):
    """sums [rows, P] = x [rows, 2 pairs] times a panel, strides in bytes; the thread's next panel lies at `after`."""
    tiles = (rows + ROWS - 1) // ROWS
    sums[: tiles * ROWS] = np.float32(0)
    ahead = _PAIR * COLUMNS // PANEL // tiles
    for low in range(0, pairs, BLOCK):
        length = min(BLOCK, pairs - low)
        ahead_at = w_at + _PAIR * (low + length) if low + length < pairs else after
        for row in range(0, rows, ROWS):
            for column in range(0, PANEL, COLUMNS):
                tile(
                    x_at + row * x_stride + 4 * low,
                    x_stride,
                    rows - 1 - row,
                    w_at + _PAIR * low + 4 * column,
                    length,
                    sums.ctypes.data + 4 * (PANEL * row + column),
                    ahead_at,
                    ahead,
                )
                ahead_at += ahead * length
