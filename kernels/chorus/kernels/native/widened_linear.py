"""Linears on a CPU that does not multiply bfloat16: weights are read as such, and widened in registers.

    for each BLOCK pairs of K
        for each 6 rows            x, widened once for the panel
            for each `COLUMNS`     sums += x w                 (`fma_tile`)
    sums, and bias and residual where there are                rounded once     -> y

A work item is a panel of 64 columns times up to 48 rows. Sums run along K in the same order whatever the tiles are, so
a row comes out alike in any batch. On 2 cores of Zen 3, 1024 x 2816: 1 row takes 0.15 ms, where torch with a weight in
float32 takes 0.28; 16 rows 0.58 (1.14), 512 rows 19.6 (21.1), which is 150 GFLOP/s. In bfloat16 torch takes 6 to 10
times as long.
"""
# numba compiles what it sees, whatever the types say.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from functools import cache

import numba
import numpy as np
import torch
import torch.nn.functional as F
from numba import carray
from torch import Tensor

from chorus.kernels.native.dot_tile import PANEL
from chorus.kernels.native.fma_tile import COLUMNS, ROWS, fma_tile
from chorus.kernels.native.numbers import OPTIONS, add_numbers, lines, narrow, pointer, take_ticket, wide
from chorus.kernels.native.team import EDITION, Compiled

MOST_ROWS = 8 * ROWS
BLOCK = 64  # 16 KiB of weights
_PAIR = 4 * PANEL  # bytes of a pair of K
_SHORT = 1 << 25  # products: 0.4 ms


def packed(weight: Tensor) -> Tensor:
    """W [N, K], bfloat16, as the kernel reads it: [ceil(N / 64), ceil(K / 2), 64, 2], zeros past N and K."""
    n, k = weight.shape
    if k % 2 or weight.storage_offset() % 2:
        weight = F.pad(weight, (0, k % 2))
    pairs, whole = weight.flatten().view(torch.int32).view(n, (k + 1) // 2), n // PANEL
    laid = torch.zeros(-(-n // PANEL), pairs.shape[1], PANEL, dtype=torch.int32)
    laid[:whole] = pairs[: whole * PANEL].view(whole, PANEL, pairs.shape[1]).transpose(1, 2)
    if n % PANEL:
        laid[whole, :, : n % PANEL] = pairs[whole * PANEL :].T
    return laid.view(torch.bfloat16).view(*laid.shape, 2)


def unpacked(weight: Tensor, n: int, k: int) -> Tensor:
    """W [N, K] again, a copy."""
    return weight.transpose(1, 2).reshape(-1, 2 * weight.shape[1])[:n, :k].clone()


def widened_linear(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    """y [T, N] = x W^T + bias + residual; bfloat16, rows contiguous, `weight` as `packed` gives it."""
    rows, n = y.shape
    panels = len(weight)
    items = panels * -(-rows // MOST_ROWS)
    stride, k = 0 if residual is None else residual.stride(0), x.shape[1]
    _kernel()(
        items,
        *(items, panels, y, y.stride(0), n, x, x.stride(0), k, rows, weight, bias, residual, stride),
        is_long=rows * n * k > _SHORT,
    )


def prepare(dtype: torch.dtype) -> None:
    """Compiles now what the first call would wait for."""
    if dtype == torch.bfloat16:
        _kernel()


@cache
def _kernel() -> Compiled:
    edition = EDITION

    def widened_linear(arguments):
        a = carray(arguments, (15,))
        items, panels, y_at, y_stride, n, x_at, x_stride, k = a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9]
        all_rows, weights_at, bias_at, residual_at, residual_stride = a[10], a[11], a[12], a[13], a[14]
        sums = lines(MOST_ROWS * PANEL).reshape((MOST_ROWS, PANEL))
        xs = np.empty((ROWS, 2 * BLOCK), np.float32)
        size = _PAIR * ((k + 1) // 2)
        following = take_ticket(arguments)
        while edition == a[1]:
            item = following
            if item >= items:
                break
            following = take_ticket(arguments)
            panel, begin = item % panels, item // panels * MOST_ROWS
            first, rows = panel * PANEL, min(MOST_ROWS, all_rows - begin)
            columns = min(PANEL, n - first)
            after = weights_at + size * (min(following, items - 1) % panels)
            _multiply(sums, xs, x_at + 2 * begin * x_stride, 2 * x_stride, weights_at + size * panel, rows, k, after)
            for row in range(rows):
                part, at = sums[row], begin + row
                if bias_at:
                    add_numbers(part[:columns], bias_at + 2 * first, np.uint16)
                if residual_at:
                    add_numbers(part[:columns], residual_at + 2 * (at * residual_stride + first), np.uint16)
                y = carray(pointer(y_at + 2 * (at * y_stride + first)), (columns,), np.uint16)
                for j in range(columns):
                    y[j] = narrow(part[j], y[j])

    return Compiled(widened_linear)


@numba.njit(**OPTIONS)
def _multiply(sums, xs, x_at, x_stride, w_at, rows, k, after):
    """sums [rows, 64] = x [rows, k] times a panel, strides in bytes; the thread's next panel lies at `after`."""
    pairs, tiles = (k + 1) // 2, (rows + ROWS - 1) // ROWS
    sums[:rows] = np.float32(0)
    ahead = _PAIR * COLUMNS // PANEL // tiles
    for low in range(0, pairs, BLOCK):
        length = min(BLOCK, pairs - low)
        ahead_at = w_at + _PAIR * (low + length) if low + length < pairs else after
        row = 0
        for tile in range(tiles):
            count = (rows - row) // (tiles - tile)
            for i in range(count):
                _widen(xs[i], x_at + (row + i) * x_stride + 4 * low, min(2 * length, k - 2 * low), 2 * length)
            for column in range(0, PANEL, COLUMNS):
                _tile(count, xs, w_at + _PAIR * low + 4 * column, length, sums[row, column:], ahead_at, ahead)
                ahead_at += ahead * length
            row += count


@numba.njit(**OPTIONS)
def _tile(rows, xs, w_at, pairs, sums, ahead_at, ahead):
    """`fma_tile` of so many rows."""
    x_at, x_stride, sums_at = xs.ctypes.data, xs.strides[0], sums.ctypes.data
    if rows == 6:
        fma_tile(6, x_at, x_stride, w_at, pairs, sums_at, ahead_at, ahead)
    elif rows == 5:
        fma_tile(5, x_at, x_stride, w_at, pairs, sums_at, ahead_at, ahead)
    elif rows == 4:
        fma_tile(4, x_at, x_stride, w_at, pairs, sums_at, ahead_at, ahead)
    elif rows == 3:
        fma_tile(3, x_at, x_stride, w_at, pairs, sums_at, ahead_at, ahead)
    elif rows == 2:
        fma_tile(2, x_at, x_stride, w_at, pairs, sums_at, ahead_at, ahead)
    else:
        fma_tile(1, x_at, x_stride, w_at, pairs, sums_at, ahead_at, ahead)


@numba.njit(**OPTIONS)
def _widen(into, at, numbers, count):
    """Numbers of bfloat16 at an address in float32, and zeros up to `count`."""
    narrowed = carray(pointer(at), (numbers,), np.uint16)
    for j in range(numbers):
        into[j] = wide(narrowed[j])
    for j in range(numbers, count):
        into[j] = np.float32(0)
