"""The Triton kernel of `row_scale`, `row_add` and `row_select`: one row and a piece of its columns a program."""
# Triton's language is not typed: annotations inside kernels name constants, no more.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, type-arg, valid-type"

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["y_rows", "slots"])
def update_rows(
    y_ptr, vectors_ptr, entries_ptr, y_rows, slots, N, y_stride,
    DOES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y[row] = y[row] * v, y[row] + v, or v, with v = vectors[slot]; rounded once. Grid (entries, N / BLOCK_N)."""
    row, slot = tl.load(entries_ptr + tl.program_id(0) * 2), tl.load(entries_ptr + tl.program_id(0) * 2 + 1)
    if slot < 0:
        return
    tl.device_assert(row < y_rows, "an entry lies outside of y")
    tl.device_assert(slot < slots, "a slot lies outside of the pool")
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    y_at = y_ptr + row.to(tl.int64) * y_stride + n
    value = tl.load(vectors_ptr + slot.to(tl.int64) * N + n, mask=n < N, other=0.0).to(tl.float32)  # [N]
    if DOES == "scale":
        value *= tl.load(y_at, mask=n < N, other=0.0).to(tl.float32)
    if DOES == "add":
        value += tl.load(y_at, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y_at, value.to(y_ptr.dtype.element_ty), mask=n < N)
