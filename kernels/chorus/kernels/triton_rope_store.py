"""The Triton kernel of `qk_norm_rope_store`: some heads of one row a program, queries first, then keys, then values.

A rotation pairs dimensions. Each is read twice, once in its own place and once as the partner of another: the second
read comes from L1, and half-split and interleaved pairs, whole and partial rotations differ in two indices only.
"""
# Triton's language is not typed: annotations inside kernels name constants, no more.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, type-arg, valid-type"

import triton
import triton.language as tl


@triton.jit
def _scaled(x, inverse, weight, KIND: tl.constexpr, dtype: tl.constexpr):
    """x [H, D] times 1 / RMS [H, 1] times the weight [1, D], rounded where transformers rounds."""
    out = x * inverse
    out = out.to(dtype).to(tl.float32) * weight if KIND == "rms" else out * (1.0 + weight)
    return out.to(dtype).to(tl.float32)


@triton.jit
def _turned(
    heads_ptr, present, weight_ptr, cos_ptr, sin_ptr, eps, dtype: tl.constexpr,
    DIM: tl.constexpr, ROTARY: tl.constexpr, KIND: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Heads that begin at heads_ptr [H, 1], normed and rotated by one row's cos and sin: [H, D] in float32."""
    d = tl.arange(0, BLOCK_D)[None, :]  # [1, D]
    turns = d < ROTARY
    if INTERLEAVED:
        first, pair = d % 2 == 0, d // 2
        partner = tl.where(first, d + 1, d - 1)
    else:
        first, pair = d < ROTARY // 2, d % (ROTARY // 2)
        partner = tl.where(first, d + ROTARY // 2, d - ROTARY // 2)
    partner = tl.where(turns, partner, d)
    inside = present & (d < DIM)
    x = tl.load(heads_ptr + d, mask=inside, other=0.0).to(tl.float32)  # [H, D]
    other = tl.load(heads_ptr + partner, mask=inside, other=0.0).to(tl.float32)
    if KIND != "":
        inverse = tl.rsqrt(tl.sum(x * x, axis=1) / DIM + eps)[:, None]
        x = _scaled(x, inverse, tl.load(weight_ptr + d, mask=d < DIM, other=0.0).to(tl.float32), KIND, dtype)
        weight = tl.load(weight_ptr + partner, mask=d < DIM, other=0.0).to(tl.float32)
        other = _scaled(other, inverse, weight, KIND, dtype)
    cos = tl.load(cos_ptr + pair, mask=turns, other=1.0).to(tl.float32)  # [1, D]
    sin = tl.load(sin_ptr + pair, mask=turns, other=0.0).to(tl.float32)
    return tl.where(turns, x * cos + other * tl.where(first, -sin, sin), x)


@triton.jit(do_not_specialize=["slots_total"])
def qk_norm_rope_store(
    qkv_ptr, query_ptr, k_cache_ptr, v_cache_ptr, cos_ptr, sin_ptr, slots_ptr, q_weight_ptr, k_weight_ptr,
    qkv_stride, angle_stride, slots_total, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROTARY: tl.constexpr,
    KIND: tl.constexpr, INTERLEAVED: tl.constexpr, LIMIT: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (T, ceil(HEADS / BLOCK_H) + 2 ceil(KV_HEADS / BLOCK_H))."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    QUERY_PARTS: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    KEY_PARTS: tl.constexpr = (KV_HEADS + BLOCK_H - 1) // BLOCK_H
    dtype: tl.constexpr = query_ptr.dtype.element_ty
    d = tl.arange(0, BLOCK_D)[None, :]  # [1, D]
    row_ptr = qkv_ptr + row * qkv_stride
    cos_row_ptr, sin_row_ptr = cos_ptr + row * angle_stride, sin_ptr + row * angle_stride
    if part < QUERY_PARTS:
        head = part * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]  # [H, 1]
        present = head < HEADS
        query = _turned(
            row_ptr + head * DIM, present, q_weight_ptr, cos_row_ptr, sin_row_ptr, eps, dtype,
            DIM, ROTARY, KIND, INTERLEAVED, BLOCK_D,
        )  # fmt: skip
        to = query_ptr + (row * HEADS + head) * DIM + d
        tl.store(to, query.to(dtype), mask=present & (d < DIM))
        return
    slot = tl.load(slots_ptr + row).to(tl.int64)
    tl.device_assert((slot >= 0) & (slot < slots_total), "a slot lies outside of the cache")
    head = (part - QUERY_PARTS) % KEY_PARTS * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]  # [H, 1]
    present = head < KV_HEADS
    inside = present & (d < DIM)
    to = ((slot // BLOCK * KV_HEADS + head) * BLOCK + slot % BLOCK) * DIM + d
    if part < QUERY_PARTS + KEY_PARTS:
        key = _turned(
            row_ptr + (HEADS + head) * DIM, present, k_weight_ptr, cos_row_ptr, sin_row_ptr, eps, dtype,
            DIM, ROTARY, KIND, INTERLEAVED, BLOCK_D,
        ).to(dtype)  # fmt: skip
        key = tl.where(tl.abs(key.to(tl.float32)) <= LIMIT, key, tl.zeros_like(key))
        tl.store(k_cache_ptr + to, key, mask=inside)
    else:
        value = tl.load(row_ptr + (HEADS + KV_HEADS + head) * DIM + d, mask=inside, other=0.0)
        value = tl.where(tl.abs(value.to(tl.float32)) <= LIMIT, value, tl.zeros_like(value))
        tl.store(v_cache_ptr + to, value, mask=inside)
