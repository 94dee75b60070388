"""`qk_norm_rope_store`: all that lies between the q, k, v product and attention.

    qkv [T, H + 2 H_kv, D] ── q ── norm ── rotate ──────────> query [T, H, D]
                           ── k ── norm ── rotate ── store ─> k_cache
                           ── v ──────────────────── store ─> v_cache

Queries and keys are rotated together. On CPU a key that is fit to be stored costs one look at its largest value instead
of three passes, and one indexed copy; on CUDA everything is one launch (`triton_rope_store`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from chorus.kernels import reference
from chorus.kernels.dispatch import TRITON_DTYPES, runs_triton
from chorus.kernels.paged_attention import storable
from chorus.kernels.types import Norm


class RopePlan:
    """How a step's rows are rotated, and where their keys go. Shared by all layers of the same frequencies.

    cos, sin [T, R / 2], a column for each pair of the first R of D dimensions, in the model's dtype or float32; slots
    [T], int64, cache positions as `reference.store_kv` means them, each within the cache. Pairs are (i, i + R / 2), or
    (2 i, 2 i + 1) if `interleaved`. `triton` says whether Triton runs (on CUDA if None).

    Raises:
        ValueError: cos, sin and slots do not fit each other.
    """

    def __init__(
        self, cos: Tensor, sin: Tensor, slots: Tensor, *, interleaved: bool = False, triton: bool | None = None
    ) -> None:
        if cos.dim() != 2 or cos.shape != sin.shape or cos.dtype != sin.dtype or cos.stride() != sin.stride():
            raise ValueError(f"cos, sin: want two alike [T, R / 2], got {tuple(cos.shape)} and {tuple(sin.shape)}")
        if cos.stride(1) != 1 or not cos.shape[1]:
            raise ValueError(f"cos, sin: want contiguous rows of at least 1, got {tuple(cos.shape)}, {cos.stride()}")
        if slots.shape != cos.shape[:1] or slots.dtype != torch.int64 or not slots.is_contiguous():
            raise ValueError(f"slots: want int64 [{cos.shape[0]}], got {slots.dtype} {tuple(slots.shape)}")
        if not cos.device == sin.device == slots.device:
            raise ValueError(f"cos, sin, slots: on {cos.device}, {sin.device} and {slots.device}")
        self.cos, self.sin, self.slots, self.interleaved = cos, sin, slots, interleaved
        self.runs_triton = runs_triton(cos.device, triton)
        self._cache_rows: dict[tuple[int, int], Tensor] = {}
        self._wide: tuple[Tensor, Tensor] | None = None

    @property
    def width(self) -> int:
        """R."""
        return 2 * self.cos.shape[1]

    def wide(self) -> tuple[Tensor, Tensor]:
        """cos, and sin with the sign of each dimension's partner: [T, 1, R]."""
        if self._wide is None:
            cos, signed = (self.cos, self.cos), (-self.sin, self.sin)
            joined = (
                torch.stack(p, dim=-1).flatten(1) if self.interleaved else torch.cat(p, dim=-1) for p in (cos, signed)
            )
            first, second = joined
            self._wide = first[:, None], second[:, None]
        return self._wide

    def cache_rows(self, heads: int, block: int) -> Tensor:
        """Rows of a cache [blocks * heads * block, D] for each row and head, [T, heads]."""
        key = heads, block
        if key not in self._cache_rows:
            head = torch.arange(heads, device=self.slots.device)
            page, offset = self.slots[:, None] // block, self.slots[:, None] % block
            self._cache_rows[key] = (page * heads + head) * block + offset
        return self._cache_rows[key]


def qk_norm_rope_store(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: RopePlan,
    *,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
) -> Tensor:
    """Norms and rotates queries and keys, stores keys and values; returns the queries, a new tensor [T, H, D].

    qkv [T, H + 2 H_kv, D], queries, keys, values; its rows may lie apart. k_cache, v_cache [blocks, H_kv, block, D],
    contiguous. The norms, both or neither, are RMSNorms over D of one kind. See `reference.qk_norm_rope_store`.

    Raises:
        ValueError: the tensors do not fit each other, the plan or the norms.
    """
    _check(qkv, k_cache, v_cache, plan)
    _check_norms(qkv, q_norm, k_norm)
    if plan.runs_triton and qkv.dtype in TRITON_DTYPES:
        from chorus.kernels.rope_store_launch import qk_norm_rope_store_op  # Triton is not everywhere

        kind, eps = ("", 0.0) if q_norm is None else (q_norm.kind, q_norm.eps)
        weights = (None, None) if q_norm is None or k_norm is None else (q_norm.weight, k_norm.weight)
        query: Tensor = qk_norm_rope_store_op(
            qkv, k_cache, v_cache, plan.cos, plan.sin, plan.slots, *weights, kind, eps, plan.interleaved
        )
        return query
    if qkv.device.type != "cpu" or plan.runs_triton:
        return reference.qk_norm_rope_store(
            qkv, k_cache, v_cache, plan.cos, plan.sin, plan.slots,
            q_norm=q_norm, k_norm=k_norm, interleaved=plan.interleaved,
        )  # fmt: skip
    kv_heads, block = k_cache.shape[1:3]
    heads = qkv.shape[1] - 2 * kv_heads
    query_key, value = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
    if q_norm is not None and k_norm is not None:
        query_key = _normed(query_key, heads, q_norm, k_norm)
    query_key = _rotated(query_key, plan)
    rows = plan.cache_rows(kv_heads, block)
    k_cache.view(-1, k_cache.shape[3])[rows] = storable(query_key[:, heads:])
    v_cache.view(-1, v_cache.shape[3])[rows] = storable(value)
    return query_key[:, :heads].contiguous()


def _normed(query_key: Tensor, heads: int, q_norm: Norm, k_norm: Norm) -> Tensor:
    """All heads at once, then each part's weight: one norm instead of two and a copy."""
    dtype, shape = query_key.dtype, query_key.shape[2:]
    plus_one = q_norm.kind == "rms_plus_one"
    wide = query_key.to(torch.promote_types(dtype, torch.float32)) if plus_one else query_key
    normed = F.rms_norm(wide, shape, None, q_norm.eps)
    for part, norm in ((normed[:, :heads], q_norm), (normed[:, heads:], k_norm)):
        part.mul_(norm.one_plus_weight if plus_one else norm.weight)
    return normed.to(dtype)


def _rotated(x: Tensor, plan: RopePlan) -> Tensor:
    """A new tensor. Three passes: rolling the halves is 7 us, a product into each half 19 (16 rows, 20 heads of 64)."""
    cos, sin = plan.wide()
    turned = x if plan.width == x.shape[2] else x[..., : plan.width]
    if plan.interleaved:
        partner = turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        partner = torch.roll(turned, plan.width // 2, -1)
    out = torch.mul(turned, cos).addcmul_(partner, sin)
    if out.dtype != x.dtype:
        out = out.to(x.dtype)
    return out if plan.width == x.shape[2] else torch.cat((out, x[..., plan.width :]), dim=-1)


def _check(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, plan: RopePlan) -> None:
    if k_cache.dim() != 4 or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"k_cache, v_cache: want two [blocks, H_kv, block, D], got {tuple(k_cache.shape)}, {tuple(v_cache.shape)}"
        )
    _, kv_heads, _, dim = k_cache.shape
    if qkv.dim() != 3 or qkv.shape[2] != dim or qkv.shape[1] <= 2 * kv_heads or not qkv.is_floating_point():
        raise ValueError(f"qkv: want [T, H + 2 * {kv_heads}, {dim}], got {qkv.dtype} {tuple(qkv.shape)}")
    if qkv.stride(2) != 1 or qkv.stride(1) != dim or (qkv.shape[0] > 1 and qkv.stride(0) < qkv.shape[1] * dim):
        raise ValueError(f"qkv: a row's heads must be contiguous and rows lie apart, strides are {qkv.stride()}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if not cache.is_contiguous() or cache.dtype != qkv.dtype or cache.device != qkv.device:
            raise ValueError(f"{name}: want contiguous {qkv.dtype} on {qkv.device}")
    if qkv.shape[0] != plan.slots.shape[0] or qkv.device != plan.cos.device:
        raise ValueError(f"plan: {plan.slots.shape[0]} rows on {plan.cos.device}, qkv has {qkv.shape[0]}")
    if plan.width > dim or plan.cos.dtype not in (qkv.dtype, torch.float32):
        raise ValueError(f"plan: rotates {plan.width} of {dim} dimensions by {plan.cos.dtype}")


def _check_norms(qkv: Tensor, q_norm: Norm | None, k_norm: Norm | None) -> None:
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm, k_norm: both or neither")
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is None or q_norm is None:
            continue
        if norm.kind == "layer" or (norm.kind, norm.eps) != (q_norm.kind, q_norm.eps) or norm.slots:
            raise ValueError(
                f"{name}: want an RMSNorm of q_norm's kind and eps, without versions' own, got {norm.kind}"
            )
        if norm.weight.shape != qkv.shape[2:] or norm.weight.dtype != qkv.dtype or norm.weight.device != qkv.device:
            raise ValueError(f"{name}: weight must be {tuple(qkv.shape[2:])}, {qkv.dtype}, on {qkv.device}")
