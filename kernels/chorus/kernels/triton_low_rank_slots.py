"""The Triton kernels of `low_rank` for all slots at once: the family SLOTS of `tuning.Family`.

A program has BLOCK_M neighbouring rows of the batch, whoever's they are, and multiplies them with the rank rows of all
adapters among them; a row keeps the lanes of its own. So how many programs there are follows from the batch's rows, not
from how they are shared out, and a CUDA graph for any batch of so many rows launches none for nothing.

    rows 0..15    a a a a a b b c c c c c c c c c       block 0: tiles a, b, c
    rows 16..31   c c d . . . . . . . . . . . . .       block 1: tiles c, d

Tiles are CHUNK rank lanes of a segment each, in the order of the batch. A block's tiles lie together: `blocks` has
where its own begin and end. A tile says which rows are its segment's, so what a row keeps is known without a mask in
memory. Rows and lanes that nobody pairs are in no block's tiles.

Between the two kernels lies what `triton_low_rank` has there: a row's own lanes alone, from column 0 on.

Another's numbers reach no row, not even by 0 * NaN: the shrink does not store such lanes, and the expand takes a tile's
product only into the rows of its segment. An adapter's lanes begin a chunk, so a row's bits depend on nobody else.
"""
# Triton's language is not typed: annotations inside kernels name constants, no more.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, type-arg, valid-type"

import triton
import triton.language as tl

from chorus.kernels.triton_low_rank_parts import (
    TILE_FIELDS,
    between,
    finished,
    load_tile,
    of_member,
    pool_rows_of,
)


@triton.jit(do_not_specialize=["x_rows", "pool_rows", "count_0", "count_1", "count_2"])
def shrink_slots(
    x_ptr, a_ptr, scale_ptr, partial_ptr, tiles_ptr, blocks_ptr, pages_ptr, x_rows, pool_rows, K, columns,
    member_columns, split_stride,
    count_0, count_1, count_2, tiles_step_1, tiles_step_2, blocks_step_1, blocks_step_2, pages_step_1, pages_step_2,
    a_step_1, a_step_2, scale_step_1, scale_step_2,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
    MEMBERS: tl.constexpr,
):  # fmt: skip
    """partial[split, t] = mid_scale * sum over the split's k of x[t, k] A[:, k], for t's own lanes.

    BLOCK_R lanes at a time, of BLOCK_R / CHUNK tiles. Grid (blocks of rows, SPLIT_K, members).
    """
    if tl.program_id(0) >= of_member(count_0, count_1, count_2, MEMBERS):
        return
    tiles_ptr += of_member(0, tiles_step_1, tiles_step_2, MEMBERS)
    pages_ptr += of_member(0, pages_step_1, pages_step_2, MEMBERS)
    block_ptr = blocks_ptr + of_member(0, blocks_step_1, blocks_step_2, MEMBERS) + 2 * tl.program_id(0)
    first_tile, end_tile = tl.load(block_ptr), tl.load(block_ptr + 1)
    if first_tile == end_tile:
        return
    a_ptr += of_member(0, a_step_1, a_step_2, MEMBERS)
    scale_ptr += of_member(0, scale_step_1, scale_step_2, MEMBERS)
    split = tl.program_id(1)
    batch_row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    present = batch_row < x_rows
    x_rows_ptr = x_ptr + batch_row.to(tl.int64) * K
    out_ptr = partial_ptr + split.to(tl.int64) * split_stride + batch_row.to(tl.int64) * columns
    lane = tl.arange(0, BLOCK_R)  # [R]
    span = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
    for first in range(first_tile, end_tile, BLOCK_R // CHUNK):
        tile = first + lane // CHUNK  # [R]
        listed = tile < end_tile
        tile_ptr = tiles_ptr + tile * TILE_FIELDS
        in_tile = lane % CHUNK
        rank = tl.load(tile_ptr + 3, mask=listed, other=0)
        pool_row, held = pool_rows_of(pages_ptr, tl.load(tile_ptr + 2, mask=listed, other=0), in_tile, rank, pool_rows)
        sums = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for start in range(split * span, tl.minimum((split + 1) * span, K), BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)  # [K]
            x_at = x_rows_ptr[:, None] + k[None, :]
            x = tl.load(x_at, mask=present[:, None] & (k < K)[None, :], other=0.0)  # [M, K]
            a_at = a_ptr + pool_row[None, :] * K + k[:, None]
            a = tl.load(a_at, mask=held[None, :] & (k < K)[:, None], other=0.0)  # [K, R]
            sums = tl.dot(x, a, sums, input_precision="ieee")
        scale = tl.load(scale_ptr + pool_row, mask=held, other=0.0)  # [R]
        row = tl.load(tile_ptr, mask=listed, other=0)
        end = row + tl.load(tile_ptr + 1, mask=listed, other=0)
        tl.device_assert(end <= x_rows, "a tile lies outside of x")
        column = tl.load(tile_ptr + 4, mask=listed, other=0) + in_tile + tl.program_id(2) * member_columns
        own = (batch_row[:, None] >= row[None, :]) & (batch_row[:, None] < end[None, :]) & (in_tile < rank)[None, :]
        tl.store(out_ptr[:, None] + column[None, :], sums * scale[None, :], mask=own)


@triton.jit(do_not_specialize=["y_rows", "pool_rows", "count_0", "count_1", "count_2"])
def expand_slots(
    y_ptr, b_ptr, partial_ptr, tiles_ptr, blocks_ptr, pages_ptr,
    mid_bias_ptr, out_bias_ptr, out_scale_ptr, row_scale_ptr, row_add_ptr,
    y_rows, pool_rows, columns, member_columns, split_stride,
    count_0, count_1, count_2, tiles_step_1, tiles_step_2, blocks_step_1, blocks_step_2, pages_step_1, pages_step_2,
    b_step_1, b_step_2, y_step_1, y_step_2, y_stride_0, y_stride_1, y_stride_2, N_0, N_1, N_2,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr,
    MEMBERS: tl.constexpr, ACTIVATED: tl.constexpr,
):  # fmt: skip
    """y[t] += (sum over splits of partial[split, t]) B, rounded once. Grid (blocks of rows, N / BLOCK_N, members).

    BLOCK_R is a tile's lanes. s is rounded to B's dtype for the dot.
    """
    if tl.program_id(0) >= of_member(count_0, count_1, count_2, MEMBERS):
        return
    y_stride = of_member(y_stride_0, y_stride_1, y_stride_2, MEMBERS)
    N = of_member(N_0, N_1, N_2, MEMBERS)
    if tl.program_id(1) * BLOCK_N >= N:
        return
    tiles_ptr += of_member(0, tiles_step_1, tiles_step_2, MEMBERS)
    pages_ptr += of_member(0, pages_step_1, pages_step_2, MEMBERS)
    block_ptr = blocks_ptr + of_member(0, blocks_step_1, blocks_step_2, MEMBERS) + 2 * tl.program_id(0)
    first_tile, end_tile = tl.load(block_ptr), tl.load(block_ptr + 1)
    if first_tile == end_tile:
        return
    b_ptr += of_member(0, b_step_1, b_step_2, MEMBERS)
    y_ptr += of_member(0, y_step_1, y_step_2, MEMBERS)
    batch_row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    inside = (batch_row < y_rows)[:, None] & (n < N)[None, :]
    y_at = y_ptr + batch_row.to(tl.int64)[:, None] * y_stride + n[None, :]
    base = tl.load(y_at, mask=inside, other=0.0)  # [M, N]
    s_ptr = partial_ptr + batch_row.to(tl.int64)[:, None] * columns + tl.program_id(2) * member_columns  # [M, 1]
    lane = tl.arange(0, BLOCK_R)  # [R]
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    vector = tl.full([BLOCK_M], -2, tl.int32)  # a row's own, -1 for none; -2 where no segment has the row
    for tile in range(first_tile, end_tile):
        tile_ptr = tiles_ptr + tile * TILE_FIELDS
        row, rows, first_page, rank, column = load_tile(tile_ptr)
        tl.device_assert(row + rows <= y_rows, "a tile lies outside of y")
        own = (batch_row >= row) & (batch_row < row + rows)
        pool_row, held = pool_rows_of(pages_ptr, first_page, lane, rank, pool_rows)
        s = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for split in tl.static_range(SPLIT_K):
            s_at = s_ptr + split * tl.cast(split_stride, tl.int64) + column + lane[None, :]
            s += tl.load(s_at, mask=own[:, None] & (lane < rank)[None, :], other=0.0)
        s = between(s, mid_bias_ptr, pool_row, lane, rank, tile_ptr, ACTIVATED)
        b_at = b_ptr + pool_row[:, None] * N + n[None, :]
        b = tl.load(b_at, mask=held[:, None] & (n < N)[None, :], other=0.0)  # [R, N]
        sums = tl.where(own[:, None], tl.dot(s.to(b.dtype), b, sums, input_precision="ieee"), sums)
        vector = tl.where(own, tl.load(tile_ptr + 6), vector)
    total = finished(
        base, sums, out_bias_ptr, out_scale_ptr, row_scale_ptr, row_add_ptr, n[None, :], N, vector[:, None]
    )
    tl.store(y_at, total.to(y_ptr.dtype.element_ty), mask=inside & (vector > -2)[:, None])
