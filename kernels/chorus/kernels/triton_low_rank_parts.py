"""What all Triton kernels of `low_rank` are made of: members of a launch, tiles, pages, what lies between and after.

Rank rows come in whole pages of 8. A page that a tile does not have is masked whole: nothing of it is read, and loads
along K and N stay vectors.
"""
# Triton's language is not typed: annotations inside kernels name constants, no more.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, type-arg, valid-type"

import triton
import triton.language as tl

PAGE_ROWS = tl.constexpr(8)
TILE_FIELDS = tl.constexpr(7)


@triton.jit
def of_member(first, second, third, MEMBERS: tl.constexpr):
    """What belongs to member pid 2."""
    value = first
    if MEMBERS > 1:
        value = tl.where(tl.program_id(2) == 1, second, value)
    if MEMBERS > 2:
        value = tl.where(tl.program_id(2) == 2, third, value)
    return value


@triton.jit
def load_tile(tile_ptr):
    """A tile's row, rows, first entry in the page table, rank lanes and first column of s."""
    return tl.load(tile_ptr), tl.load(tile_ptr + 1), tl.load(tile_ptr + 2), tl.load(tile_ptr + 3), tl.load(tile_ptr + 4)


@triton.jit
def between(s, mid_bias_ptr, pool_row, lane, rank, tile_ptr, ACTIVATED: tl.constexpr):
    """act(s + mid_bias) for s [R] or [M, R], 0 past the rank; codes are `types.Activation`'s. NaN stays NaN."""
    if mid_bias_ptr is not None:
        s += tl.load(mid_bias_ptr + pool_row, mask=lane < rank, other=0.0)
    if ACTIVATED:
        code = tl.load(tile_ptr + 5)
        if code == 1:
            s = tl.where(s < 0, 0.0, s)
        elif code == 2:
            s = 0.5 * s * (1 + tl.erf(s * 0.7071067811865476))
        elif code == 3:
            s = 0.5 * s * (1 + tanh(0.7978845608028654 * (s + 0.044715 * s * s * s)))
        elif code == 4:
            s = s / (1 + tl.exp(-s))
        elif code == 5:
            s = tanh(s)
    return s


@triton.jit
def tanh(x):
    return 1 - 2 / (tl.exp(2 * x) + 1)


@triton.jit
def finished(base, delta, out_bias_ptr, out_scale_ptr, row_scale_ptr, row_add_ptr, n, N, vector):
    """row_scale * (base + out_scale * (delta + out_bias)) + row_add in float32; where vector is -1 it only adds.

    vector is a number, for n [N], or [M, 1], for n [1, N].
    """
    at = tl.maximum(vector, 0).to(tl.int64) * N + n
    named = n < tl.where(vector >= 0, N, 0)
    if out_bias_ptr is not None:
        delta += tl.load(out_bias_ptr + at, mask=named, other=0.0).to(tl.float32)
    if out_scale_ptr is not None:
        delta *= tl.load(out_scale_ptr + at, mask=named, other=1.0).to(tl.float32)
    total = base.to(tl.float32) + delta
    if row_scale_ptr is not None:
        total *= tl.load(row_scale_ptr + at, mask=named, other=1.0).to(tl.float32)
    if row_add_ptr is not None:
        total += tl.load(row_add_ptr + at, mask=named, other=0.0).to(tl.float32)
    return total


@triton.jit
def pool_rows_of(pages_ptr, first_page, lane, rank, pool_rows):
    """For rank lanes [R]: their pool rows (int64), and True for each lane of a page that there is."""
    page_of_lane = lane // PAGE_ROWS
    held = page_of_lane * PAGE_ROWS < rank
    page = tl.load(pages_ptr + first_page + page_of_lane, mask=held, other=0)
    tl.device_assert((page >= 0) & (page * PAGE_ROWS < pool_rows), "a page lies outside of the pool")
    return page.to(tl.int64) * PAGE_ROWS + lane % PAGE_ROWS, held
