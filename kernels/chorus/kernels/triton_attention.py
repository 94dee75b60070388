"""The Triton kernels of attention over a paged KV cache: store_kv, attend, combine.

`attend` works off items: some new tokens of one sequence over a range of its context, for one key head and all query
heads that share it. Decodes and prefill chunks differ in the number of tokens only. A long context is cut into ranges
of fixed length, each an item of its own; `combine` adds their results in the order of the ranges. What is cut where
depends on the sequence alone and nothing is atomic, so equal inputs give equal bits in whatever batch. Without CAUSAL
tokens see all of their range: cross-attention, and encoders. PACKED keys are pages of one token that lie in order.

Softmax runs online in base 2 and float32. Positions that are masked still enter the products, times 0: the cache holds
finite numbers only (see `reference.store_kv`). float32 takes input_precision="ieee": tf32 would be 1e-3 off.
"""
# Triton's language is not typed: annotations inside kernels name constants, no more.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, type-arg, valid-type"

import triton
import triton.language as tl

ITEM_FIELDS = tl.constexpr(7)
MERGE_FIELDS = tl.constexpr(3)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["slots_total"])
def store_kv(
    key_ptr, value_ptr, k_cache_ptr, v_cache_ptr, slots_ptr,
    key_stride_t, key_stride_h, value_stride_t, value_stride_h, slots_total,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Row t's keys and values, [HEADS, DIM] each, to position slots[t]. Grid (T, HEADS * DIM / BLOCK_C)."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    tl.device_assert((slot >= 0) & (slot < slots_total), "a slot lies outside of the cache")
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [C]
    inside = column < HEADS * DIM
    head, d = (column // DIM).to(tl.int64), column % DIM
    to = ((slot // BLOCK * HEADS + head) * BLOCK + slot % BLOCK) * DIM + d
    key = tl.load(key_ptr + row * key_stride_t + head * key_stride_h + d, mask=inside, other=0.0)
    value = tl.load(value_ptr + row * value_stride_t + head * value_stride_h + d, mask=inside, other=0.0)
    key = tl.where(tl.abs(key.to(tl.float32)) <= LIMIT, key, tl.zeros_like(key))
    value = tl.where(tl.abs(value.to(tl.float32)) <= LIMIT, value, tl.zeros_like(value))
    tl.store(k_cache_ptr + to, key, mask=inside)
    tl.store(v_cache_ptr + to, value, mask=inside)


@triton.jit
def bias_by_distance(bias_ptr, first_head, group, distance, furthest, GROUP: tl.constexpr):
    """What heads first_head + group [M] add for keys `distance` [M, N] after the query; bias [H, 2 * furthest + 1]."""
    column = tl.minimum(tl.maximum(distance, -furthest), furthest) + furthest
    return tl.load(
        bias_ptr + (first_head + group)[:, None] * (2 * furthest + 1) + column, mask=(group < GROUP)[:, None], other=0.0
    )


@triton.jit(do_not_specialize=["rows_total", "window", "furthest"])
def attend(
    query_ptr, k_cache_ptr, v_cache_ptr, out_ptr, partial_ptr, lse_ptr, bias_ptr, items_ptr, pages_ptr,
    rows_total, pages_total, scale, window, soft_cap, furthest,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One item and key head. Grid (items, KV_HEADS). query, out [T, KV_HEADS * GROUP, DIM].

    bias [KV_HEADS * GROUP, 2 * furthest + 1], by how far after the query a key stands.
    """
    item, kv_head = items_ptr + tl.program_id(0) * ITEM_FIELDS, tl.program_id(1)
    row, tokens, position, first_page = tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    begin, end, part = tl.load(item + 4), tl.load(item + 5), tl.load(item + 6)
    if tokens == 0:
        return
    tl.device_assert(row + tokens <= rows_total, "an item lies outside of the query")
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    token, group = m // BLOCK_G, m % BLOCK_G  # [M]
    present = (token < tokens) & (group < GROUP)
    head_row = (row + token).to(tl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP + group  # [M]
    inside = present[:, None] & (d < DIM)[None, :]
    q = tl.load(query_ptr + head_row[:, None] * DIM + d[None, :], mask=inside, other=0.0)  # [M, D]
    last = position + token  # [M], the last position that each query sees
    highest, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)  # [N]
        page = first_page + n
        if not PACKED:
            page = tl.load(pages_ptr + first_page + n // BLOCK, mask=n < end, other=0)
            tl.device_assert((page >= 0) & (page < pages_total), "a page lies outside of the cache")
        cache_row = (page.to(tl.int64) * KV_HEADS + kv_head) * BLOCK + n % BLOCK  # [N]
        held = (n < end)[:, None] & (d < DIM)[None, :]
        k = tl.load(k_cache_ptr + cache_row[:, None] * DIM + d[None, :], mask=held, other=0.0)  # [N, D]
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [M, N]
        if HAS_CAP:
            scores = soft_cap * (2.0 * tl.sigmoid(2.0 * scores / soft_cap) - 1.0)
        if HAS_BIAS:
            scores += bias_by_distance(bias_ptr, kv_head * GROUP, group, n[None, :] - last[:, None], furthest, GROUP)
        seen = (n < end)[None, :]
        if CAUSAL:
            seen = seen & (n[None, :] <= last[:, None])
        if HAS_WINDOW:
            seen = seen & (n[None, :] > last[:, None] - window)
        scores = tl.where(seen, scores * LOG2_E, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a query that has seen nothing yet
        weights = tl.exp2(scores - base[:, None])  # [M, N]
        faded = tl.exp2(highest - base)
        total = total * faded + tl.sum(weights, axis=1)
        v = tl.load(v_cache_ptr + cache_row[:, None] * DIM + d[None, :], mask=held, other=0.0)  # [N, D]
        sums = tl.dot(weights.to(v.dtype), v, sums * faded[:, None], input_precision="ieee")
        highest = higher
    divisor = tl.where(total == 0.0, 1.0, total)
    result = sums / divisor[:, None]
    if part < 0:
        tl.store(out_ptr + head_row[:, None] * DIM + d[None, :], result.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        # One token: a decode. [parts, H, D] and [parts, H].
        part_row = part.to(tl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP + group  # [M]
        tl.store(partial_ptr + part_row[:, None] * DIM + d[None, :], result, mask=inside)
        tl.store(lse_ptr + part_row, highest + tl.log2(divisor), mask=present)


@triton.jit
def combine(
    out_ptr, partial_ptr, lse_ptr, merges_ptr,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds the ranges of one decode row, in their order. Grid (merges, HEADS)."""
    merge = merges_ptr + tl.program_id(0) * MERGE_FIELDS
    row, first, parts = tl.load(merge), tl.load(merge + 1), tl.load(merge + 2)
    if parts == 0:
        return
    head = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    lse_row_ptr = lse_ptr + first.to(tl.int64) * HEADS + head
    part_row_ptr = partial_ptr + (first.to(tl.int64) * HEADS + head) * DIM + d  # [D]
    highest = tl.load(lse_row_ptr)
    for i in range(1, parts):
        highest = tl.maximum(highest, tl.load(lse_row_ptr + i * HEADS))
    total = 0.0
    sums = tl.zeros([BLOCK_D], tl.float32)
    for i in range(parts):
        weight = tl.exp2(tl.load(lse_row_ptr + i * HEADS) - highest)
        sums += weight * tl.load(part_row_ptr + i * HEADS * DIM, mask=d < DIM, other=0.0)
        total += weight
    to = out_ptr + (row.to(tl.int64) * HEADS + head) * DIM + d
    tl.store(to, (sums / total).to(out_ptr.dtype.element_ty), mask=d < DIM)
