"""Triton kernels between a layer's linears: residual_norm, gated_mul.

Each follows transformers in what is rounded when: a sum, an activation or a normed value that transformers keeps in the
model's dtype is rounded to it here too, before it is used on. All arithmetic is float32.
"""
# Triton's language is not typed: annotations inside kernels name constants, no more.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, type-arg, valid-type"

import triton
import triton.language as tl


@triton.jit
def _vector(base_ptr, pool_ptr, slot, n, N, HAS_POOL: tl.constexpr):
    """The slot's vector of the pool, or the base's where there is none; [N] in float32."""
    if HAS_POOL:
        if slot >= 0:
            value = tl.load(pool_ptr + slot.to(tl.int64) * N + n, mask=n < N, other=0.0)
        else:
            value = tl.load(base_ptr + n, mask=n < N, other=0.0)
    else:
        value = tl.load(base_ptr + n, mask=n < N, other=0.0)
    return value.to(tl.float32)


@triton.jit(do_not_specialize=["slots_at", "slots_total"])
def residual_norm(
    residual_ptr, x_ptr, out_ptr, weight_ptr, bias_ptr, weights_ptr, biases_ptr, table_ptr,
    slots_at, slots_total, residual_stride, x_stride, N, eps,
    KIND: tl.constexpr, HAS_X: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_POOL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """residual += x; out = norm(residual) * weight + bias, whole rows. Grid (T)."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)  # [N]
    dtype = out_ptr.dtype.element_ty
    residual_at = residual_ptr + row * residual_stride + n
    h = tl.load(residual_at, mask=n < N, other=0.0)
    if HAS_X:
        x = tl.load(x_ptr + row * x_stride + n, mask=n < N, other=0.0)
        h = (h.to(tl.float32) + x.to(tl.float32)).to(dtype)
        tl.store(residual_at, h, mask=n < N)
    slot = -1
    if HAS_POOL:
        slot = tl.load(table_ptr + slots_at + tl.program_id(0))
        tl.device_assert(slot < slots_total, "a slot lies outside of the pool")
    value = h.to(tl.float32)
    if KIND == "layer":
        value = tl.where(n < N, value - tl.sum(value, axis=0) / N, 0.0)
    normed = value * tl.rsqrt(tl.sum(value * value, axis=0) / N + eps)
    weight = _vector(weight_ptr, weights_ptr, slot, n, N, HAS_POOL)
    if KIND == "rms":
        out = normed.to(dtype).to(tl.float32) * weight
    elif KIND == "rms_plus_one":
        out = normed * (1.0 + weight)
    else:
        out = normed * weight
        if HAS_BIAS:
            out += _vector(bias_ptr, biases_ptr, slot, n, N, HAS_POOL)
    tl.store(out_ptr + row * N + n, out.to(dtype), mask=n < N)


@triton.jit
def gated_mul(
    gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, N,
    ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out = act(gate) * up. Grid (T, N / BLOCK_N)."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    dtype = out_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + row * gate_stride + n, mask=n < N, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + n, mask=n < N, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        act = gate * tl.sigmoid(gate)
    else:
        # 0.5 (1 + tanh(z)) = sigmoid(2 z), z = sqrt(2 / pi) (g + 0.044715 g^3)
        act = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    tl.store(out_ptr + row * N + n, (act.to(dtype).to(tl.float32) * up).to(dtype), mask=n < N)
