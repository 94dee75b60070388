"""The Triton kernel of `head`: one linear layer of segments, each with rows of weights of its own.

A tile is up to BLOCK_M rows of one segment; its program computes BLOCK_N of its outputs over all of K, in order: no
atomics, so equal inputs give equal bits. Weight rows past a segment's own are not read.
"""
# Triton's language is not typed: annotations inside kernels name constants, no more.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, type-arg, valid-type"

import triton
import triton.language as tl

TILE_FIELDS = tl.constexpr(4)


@triton.jit(do_not_specialize=["x_rows", "weight_rows", "layer_rows"])
def segment_linear(
    x_ptr, weight_ptr, bias_ptr, out_ptr, tiles_ptr, x_rows, weight_rows, layer_rows, K, x_stride, out_stride,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[row, n] = act(x[row] . weight[first + n] + bias[first + n]). Grid (tiles, N / BLOCK_N).

    layer_rows > 0 says that a tile names a layer of that many rows; else it names its rows.
    """
    tile = tiles_ptr + tl.program_id(0) * TILE_FIELDS
    row, rows, place, own = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    if rows == 0:
        return
    first, count = place.to(tl.int64), own
    if layer_rows > 0:
        first, count = place.to(tl.int64) * layer_rows, layer_rows
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    if tl.program_id(1) * BLOCK_N >= count:
        return
    tl.device_assert(row + rows <= x_rows, "a tile lies outside of x")
    tl.device_assert(first + count <= weight_rows, "a tile's weights lie outside of the pool")
    m = tl.arange(0, BLOCK_M)
    present, held = m < rows, n < count
    batch_row = row.to(tl.int64) + m  # [M]
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)  # [K]
        x_at = x_ptr + batch_row[:, None] * x_stride + k[None, :]
        x = tl.load(x_at, mask=present[:, None] & (k < K)[None, :], other=0.0)  # [M, K]
        weight_at = weight_ptr + (first + n)[None, :] * K + k[:, None]
        weight = tl.load(weight_at, mask=held[None, :] & (k < K)[:, None], other=0.0)  # [K, N]
        sums = tl.dot(x, weight, sums, input_precision="ieee")
    value = sums + tl.load(bias_ptr + first + n, mask=held, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "tanh":
        value = 2.0 * tl.sigmoid(2.0 * value) - 1.0
    if ACTIVATION == "relu":
        value = tl.where(value < 0.0, 0.0, value)  # a NaN stays one
    if ACTIVATION == "gelu":
        value = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    out_at = out_ptr + batch_row[:, None] * out_stride + n[None, :]
    tl.store(out_at, value.to(out_ptr.dtype.element_ty), mask=present[:, None] & held[None, :])
