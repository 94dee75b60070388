"""The Triton kernels of `low_rank`: shrink (s = mid_scale * x A^T), expand (y += s B), and the gradient of A or B.

A launch covers every tile of one family (`tuning.Family`), for up to three sites that read the same x: its members,
the grid's last axis. Members' tensors are found from the first one's by how many elements they lie apart: an integer
keeps what the compiler knows of its alignment, a pointer chosen or loaded at run time does not. What a tile is comes
from the tables that `low_rank_tables` builds on the host.

Between the two kernels lie partial sums, [SPLIT_K, T, columns] float32, member_columns of them each member's: the
shrink's programs of one tile share K among them, the expand adds their sums in the order of the splits. No atomics, so
equal inputs give equal bits.

Rank rows come in whole pages of 8. A page that a tile does not have is masked whole: nothing of it is read, and loads
along K and N stay vectors. Rows of a last page past the rank may hold any finite numbers: 0 stands for their sums.

float32 takes input_precision="ieee": tf32 would be 1e-3 off.
"""
# Triton's language is not typed: annotations inside kernels name constants, no more.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, type-arg, valid-type"

import triton
import triton.language as tl

from chorus.kernels.triton_low_rank_parts import TILE_FIELDS, between, finished, load_tile, of_member, pool_rows_of


@triton.jit(do_not_specialize=["x_rows", "pool_rows", "count_0", "count_1", "count_2"])
def shrink_rows(
    x_ptr, a_ptr, scale_ptr, partial_ptr, tiles_ptr, pages_ptr, x_rows, pool_rows, K, columns,
    member_columns, split_stride,
    count_0, count_1, count_2, tiles_step_1, tiles_step_2, pages_step_1, pages_step_2,
    a_step_1, a_step_2, scale_step_1, scale_step_2,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    """partial[split, row] = mid_scale * sum over the split's k of x[row, k] A[:, k]. Grid (tiles, SPLIT_K, members)."""
    if tl.program_id(0) >= of_member(count_0, count_1, count_2, MEMBERS):
        return
    tile_ptr = tiles_ptr + of_member(0, tiles_step_1, tiles_step_2, MEMBERS) + tl.program_id(0) * TILE_FIELDS
    pages_ptr += of_member(0, pages_step_1, pages_step_2, MEMBERS)
    a_ptr += of_member(0, a_step_1, a_step_2, MEMBERS)
    scale_ptr += of_member(0, scale_step_1, scale_step_2, MEMBERS)
    row, rows, first_page, rank, column = load_tile(tile_ptr)
    if rows == 0:
        return
    column += tl.program_id(2) * member_columns
    tl.device_assert(row < x_rows, "a tile lies outside of x")
    split = tl.program_id(1)
    lane = tl.arange(0, BLOCK_R)  # [R]
    pool_row, held = pool_rows_of(pages_ptr, first_page, lane, rank, pool_rows)
    x_row_ptr = x_ptr + row.to(tl.int64) * K
    a_rows_ptr = a_ptr + pool_row * K  # [R]
    span = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
    sums = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for start in range(split * span, tl.minimum((split + 1) * span, K), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)  # [K]
        x = tl.load(x_row_ptr + k, mask=k < K, other=0.0).to(tl.float32)  # [K]
        a = tl.load(a_rows_ptr[:, None] + k[None, :], mask=held[:, None] & (k < K)[None, :], other=0.0)  # [R, K]
        sums += a.to(tl.float32) * x[None, :]
    scale = tl.load(scale_ptr + pool_row, mask=held, other=0.0)  # [R]
    value = tl.where(lane < rank, tl.sum(sums, axis=1) * scale, 0.0)
    out_ptr = partial_ptr + split.to(tl.int64) * split_stride + row.to(tl.int64) * columns
    tl.store(out_ptr + column + lane, value)


@triton.jit(do_not_specialize=["x_rows", "pool_rows", "count_0", "count_1", "count_2"])
def shrink_tiles(
    x_ptr, a_ptr, scale_ptr, partial_ptr, tiles_ptr, pages_ptr, x_rows, pool_rows, K, columns,
    member_columns, split_stride,
    count_0, count_1, count_2, tiles_step_1, tiles_step_2, pages_step_1, pages_step_2,
    a_step_1, a_step_2, scale_step_1, scale_step_2,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
    MEMBERS: tl.constexpr,
):  # fmt: skip
    """`shrink_rows` for tiles of up to BLOCK_M rows of one segment, on matrix instructions. The same grid."""
    if tl.program_id(0) >= of_member(count_0, count_1, count_2, MEMBERS):
        return
    tile_ptr = tiles_ptr + of_member(0, tiles_step_1, tiles_step_2, MEMBERS) + tl.program_id(0) * TILE_FIELDS
    pages_ptr += of_member(0, pages_step_1, pages_step_2, MEMBERS)
    a_ptr += of_member(0, a_step_1, a_step_2, MEMBERS)
    scale_ptr += of_member(0, scale_step_1, scale_step_2, MEMBERS)
    row, rows, first_page, rank, column = load_tile(tile_ptr)
    if rows == 0:
        return
    column += tl.program_id(2) * member_columns
    tl.device_assert(row + rows <= x_rows, "a tile lies outside of x")
    split = tl.program_id(1)
    lane = tl.arange(0, BLOCK_R)  # [R]
    pool_row, held = pool_rows_of(pages_ptr, first_page, lane, rank, pool_rows)
    m = tl.arange(0, BLOCK_M)  # [M]
    present = m < rows
    batch_row = row.to(tl.int64) + m
    span = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
    sums = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for start in range(split * span, tl.minimum((split + 1) * span, K), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)  # [K]
        x_at = x_ptr + batch_row[:, None] * K + k[None, :]
        x = tl.load(x_at, mask=present[:, None] & (k < K)[None, :], other=0.0)  # [M, K]
        a_at = a_ptr + pool_row[None, :] * K + k[:, None]
        a = tl.load(a_at, mask=held[None, :] & (k < K)[:, None], other=0.0)  # [K, R]
        sums = tl.dot(x, a, sums, input_precision="ieee")
    scale = tl.load(scale_ptr + pool_row, mask=held, other=0.0)  # [R]
    value = tl.where((lane < rank)[None, :], sums * scale[None, :], 0.0)  # [M, R]
    out_ptr = partial_ptr + split.to(tl.int64) * split_stride + batch_row * columns  # [M]
    tl.store(out_ptr[:, None] + column + lane[None, :], value, mask=present[:, None])


@triton.jit(do_not_specialize=["y_rows", "pool_rows", "count_0", "count_1", "count_2"])
def expand_rows(
    y_ptr, b_ptr, partial_ptr, tiles_ptr, pages_ptr,
    mid_bias_ptr, out_bias_ptr, out_scale_ptr, row_scale_ptr, row_add_ptr,
    y_rows, pool_rows, columns, member_columns, split_stride,
    count_0, count_1, count_2, tiles_step_1, tiles_step_2, pages_step_1, pages_step_2,
    b_step_1, b_step_2, y_step_1, y_step_2, y_stride_0, y_stride_1, y_stride_2, N_0, N_1, N_2,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr, MEMBERS: tl.constexpr,
    ACTIVATED: tl.constexpr,
):  # fmt: skip
    """y[row] += (sum over splits of partial[split, row]) B, rounded once. Grid (tiles, N / BLOCK_N, members)."""
    if tl.program_id(0) >= of_member(count_0, count_1, count_2, MEMBERS):
        return
    tile_ptr = tiles_ptr + of_member(0, tiles_step_1, tiles_step_2, MEMBERS) + tl.program_id(0) * TILE_FIELDS
    pages_ptr += of_member(0, pages_step_1, pages_step_2, MEMBERS)
    b_ptr += of_member(0, b_step_1, b_step_2, MEMBERS)
    y_ptr += of_member(0, y_step_1, y_step_2, MEMBERS)
    y_stride = of_member(y_stride_0, y_stride_1, y_stride_2, MEMBERS)
    N = of_member(N_0, N_1, N_2, MEMBERS)
    if tl.program_id(1) * BLOCK_N >= N:
        return
    row, rows, first_page, rank, column = load_tile(tile_ptr)
    if rows == 0:
        return
    column += tl.program_id(2) * member_columns
    tl.device_assert(row < y_rows, "a tile lies outside of y")
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    y_at = y_ptr + row.to(tl.int64) * y_stride + n
    base = tl.load(y_at, mask=n < N, other=0.0)  # asked for before the sums, so that it arrives meanwhile
    split = tl.arange(0, SPLIT_K).to(tl.int64)
    s_ptr = partial_ptr + split[:, None] * split_stride + row.to(tl.int64) * columns + column  # [S, 1]
    sums = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, rank, BLOCK_R):
        lane = first + tl.arange(0, BLOCK_R)  # [R]
        pool_row, held = pool_rows_of(pages_ptr, first_page, lane, rank, pool_rows)
        s = tl.sum(tl.load(s_ptr + lane[None, :]), axis=0)  # [R]
        s = between(s, mid_bias_ptr, pool_row, lane, rank, tile_ptr, ACTIVATED)
        b_at = b_ptr + pool_row[:, None] * N + n[None, :]
        b = tl.load(b_at, mask=held[:, None] & (n < N)[None, :], other=0.0)  # [R, N]
        sums += tl.sum(s[:, None] * b.to(tl.float32), axis=0)
    total = finished(base, sums, out_bias_ptr, out_scale_ptr, row_scale_ptr, row_add_ptr, n, N, tl.load(tile_ptr + 6))
    tl.store(y_at, total.to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["y_rows", "pool_rows", "count_0", "count_1", "count_2"])
def expand_tiles(
    y_ptr, b_ptr, partial_ptr, tiles_ptr, pages_ptr,
    mid_bias_ptr, out_bias_ptr, out_scale_ptr, row_scale_ptr, row_add_ptr,
    y_rows, pool_rows, columns, member_columns, split_stride,
    count_0, count_1, count_2, tiles_step_1, tiles_step_2, pages_step_1, pages_step_2,
    b_step_1, b_step_2, y_step_1, y_step_2, y_stride_0, y_stride_1, y_stride_2, N_0, N_1, N_2,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr,
    MEMBERS: tl.constexpr, ACTIVATED: tl.constexpr,
):  # fmt: skip
    """`expand_rows` for tiles of up to BLOCK_M rows of one segment. s is rounded to B's dtype for the dot."""
    if tl.program_id(0) >= of_member(count_0, count_1, count_2, MEMBERS):
        return
    tile_ptr = tiles_ptr + of_member(0, tiles_step_1, tiles_step_2, MEMBERS) + tl.program_id(0) * TILE_FIELDS
    pages_ptr += of_member(0, pages_step_1, pages_step_2, MEMBERS)
    b_ptr += of_member(0, b_step_1, b_step_2, MEMBERS)
    y_ptr += of_member(0, y_step_1, y_step_2, MEMBERS)
    y_stride = of_member(y_stride_0, y_stride_1, y_stride_2, MEMBERS)
    N = of_member(N_0, N_1, N_2, MEMBERS)
    if tl.program_id(1) * BLOCK_N >= N:
        return
    row, rows, first_page, rank, column = load_tile(tile_ptr)
    if rows == 0:
        return
    column += tl.program_id(2) * member_columns
    tl.device_assert(row + rows <= y_rows, "a tile lies outside of y")
    m = tl.arange(0, BLOCK_M)  # [M]
    present = m < rows
    batch_row = row.to(tl.int64) + m
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    inside = present[:, None] & (n < N)[None, :]
    y_at = y_ptr + batch_row[:, None] * y_stride + n[None, :]
    base = tl.load(y_at, mask=inside, other=0.0)  # [M, N]
    s_ptr = partial_ptr + batch_row[:, None] * columns + column  # [M, 1]
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, rank, BLOCK_R):
        lane = first + tl.arange(0, BLOCK_R)  # [R]
        pool_row, held = pool_rows_of(pages_ptr, first_page, lane, rank, pool_rows)
        s = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for split in tl.static_range(SPLIT_K):
            s += tl.load(
                s_ptr + split * tl.cast(split_stride, tl.int64) + lane[None, :], mask=present[:, None], other=0.0
            )
        s = between(s, mid_bias_ptr, pool_row, lane, rank, tile_ptr, ACTIVATED)
        b_at = b_ptr + pool_row[:, None] * N + n[None, :]
        b = tl.load(b_at, mask=held[:, None] & (n < N)[None, :], other=0.0)  # [R, N]
        sums = tl.dot(s.to(b.dtype), b, sums, input_precision="ieee")
    total = finished(base, sums, out_bias_ptr, out_scale_ptr, row_scale_ptr, row_add_ptr, n, N, tl.load(tile_ptr + 6))
    tl.store(y_at, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["y_rows", "pool_rows", "count_0", "count_1", "count_2"])
def fused_rows(
    y_ptr, x_ptr, a_ptr, scale_ptr, b_ptr, tiles_ptr, pages_ptr,
    mid_bias_ptr, out_bias_ptr, out_scale_ptr, row_scale_ptr, row_add_ptr,
    y_rows, pool_rows, K,
    count_0, count_1, count_2, tiles_step_1, tiles_step_2, pages_step_1, pages_step_2,
    a_step_1, a_step_2, scale_step_1, scale_step_2,
    b_step_1, b_step_2, y_step_1, y_step_2, y_stride_0, y_stride_1, y_stride_2, N_0, N_1, N_2,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, MEMBERS: tl.constexpr,
    ACTIVATED: tl.constexpr,
):  # fmt: skip
    """`expand_rows`, each program with a whole shrink of its own before it: one launch. The expand's grid and tiles."""
    if tl.program_id(0) >= of_member(count_0, count_1, count_2, MEMBERS):
        return
    tile_ptr = tiles_ptr + of_member(0, tiles_step_1, tiles_step_2, MEMBERS) + tl.program_id(0) * TILE_FIELDS
    pages_ptr += of_member(0, pages_step_1, pages_step_2, MEMBERS)
    a_ptr += of_member(0, a_step_1, a_step_2, MEMBERS)
    scale_ptr += of_member(0, scale_step_1, scale_step_2, MEMBERS)
    b_ptr += of_member(0, b_step_1, b_step_2, MEMBERS)
    y_ptr += of_member(0, y_step_1, y_step_2, MEMBERS)
    y_stride = of_member(y_stride_0, y_stride_1, y_stride_2, MEMBERS)
    N = of_member(N_0, N_1, N_2, MEMBERS)
    if tl.program_id(1) * BLOCK_N >= N:
        return
    row, rows, first_page, rank, _ = load_tile(tile_ptr)
    if rows == 0:
        return
    tl.device_assert(row < y_rows, "a tile lies outside of y")
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    y_at = y_ptr + row.to(tl.int64) * y_stride + n
    base = tl.load(y_at, mask=n < N, other=0.0)
    x_row_ptr = x_ptr + row.to(tl.int64) * K
    delta = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, rank, BLOCK_R):
        lane = first + tl.arange(0, BLOCK_R)  # [R]
        pool_row, held = pool_rows_of(pages_ptr, first_page, lane, rank, pool_rows)
        b_at = b_ptr + pool_row[:, None] * N + n[None, :]
        b = tl.load(b_at, mask=held[:, None] & (n < N)[None, :], other=0.0)  # [R, N], asked for before the shrink
        sums = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)  # [K]
            x = tl.load(x_row_ptr + k, mask=k < K, other=0.0).to(tl.float32)  # [K]
            a_at = a_ptr + pool_row[:, None] * K + k[None, :]
            a = tl.load(a_at, mask=held[:, None] & (k < K)[None, :], other=0.0)  # [R, K]
            sums += a.to(tl.float32) * x[None, :]
        scale = tl.load(scale_ptr + pool_row, mask=held, other=0.0)  # [R]
        s = tl.where(lane < rank, tl.sum(sums, axis=1) * scale, 0.0)
        s = between(s, mid_bias_ptr, pool_row, lane, rank, tile_ptr, ACTIVATED)
        delta += tl.sum(s[:, None] * b.to(tl.float32), axis=0)
    total = finished(base, delta, out_bias_ptr, out_scale_ptr, row_scale_ptr, row_add_ptr, n, N, tl.load(tile_ptr + 6))
    tl.store(y_at, total.to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["x_rows", "pool_rows"])
def weight_gradient(
    x_ptr, s_ptr, out_ptr, tiles_ptr, pages_ptr, x_rows, pool_rows, K, columns,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[pool rows of a segment] = s^T x over the segment's rows, in their order. Grid (tiles, K / BLOCK_K)."""
    row, rows, first_page, rank, column = load_tile(tiles_ptr + tl.program_id(0) * TILE_FIELDS)
    tl.device_assert(row + rows <= x_rows, "a tile lies outside of x")
    lane = tl.arange(0, BLOCK_R)  # [R]
    pool_row, held = pool_rows_of(pages_ptr, first_page, lane, rank, pool_rows)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)  # [K]
    sums = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for first in range(0, rows, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)  # [M]
        present = m < rows
        batch_row = row.to(tl.int64) + m
        s_at = s_ptr + batch_row[None, :] * columns + column + lane[:, None]
        s = tl.load(s_at, mask=present[None, :] & held[:, None], other=0.0)  # [R, M]
        x_at = x_ptr + batch_row[:, None] * K + k[None, :]
        x = tl.load(x_at, mask=present[:, None] & (k < K)[None, :], other=0.0)  # [M, K]
        sums = tl.dot(s.to(x.dtype), x, sums, input_precision="ieee")
    out_at = out_ptr + pool_row[:, None] * K + k[None, :]
    tl.store(out_at, sums.to(out_ptr.dtype.element_ty), mask=(lane < rank)[:, None] & (k < K)[None, :])
