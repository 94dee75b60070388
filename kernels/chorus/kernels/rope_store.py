"""`qk_norm_rope_store`: all that lies between the q, k, v product and attention.

    qkv [T, H + 2 H_kv, D] ── q ── norm ── rotate ──────────> query [T, H, D]
                           ── k ── norm ── rotate ── store ─> k_cache
                           ── v ──────────────────── store ─> v_cache

One launch: on a CPU of a compiled kernel (`native.rope_store`), on CUDA of Triton's (`triton_rope_store`).
"""

from functools import cached_property

import torch
from torch import Tensor

from chorus.kernels import reference
from chorus.kernels.dispatch import TRITON_DTYPES, runs_native, runs_triton
from chorus.kernels.types import Norm


class RopePlan:
    """How a step's rows are rotated, and where their keys go. Shared by all layers of the same frequencies.

    cos, sin [T, R / 2], a column for each pair of the first R of D dimensions, in the model's dtype or float32; slots
    [T], int64, cache positions as `reference.store_kv` means them, each within the cache. Pairs are (i, i + R / 2), or
    (2 i, 2 i + 1) if `interleaved`. `triton` says whether Triton runs (on CUDA if None). `ends` are the lowest and the
    highest slot where the caller knows them; else compiled code, which writes where slots say, has them looked for.

    Raises:
        ValueError: cos, sin and slots do not fit each other.
    """

    def __init__(
        self,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        *,
        interleaved: bool = False,
        triton: bool | None = None,
        ends: tuple[int, int] | None = None,
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
        self.rows, self.width, self.device = len(cos), 2 * cos.shape[1], cos.device  # width is R
        self.runs_triton = runs_triton(cos.device, triton)
        self._ends = ends

    @cached_property
    def ends(self) -> tuple[int, int]:
        """The lowest and the highest slot where compiled code writes at them; Triton's kernel looks for itself."""
        if self._ends is not None:
            return self._ends
        if self.runs_triton or not self.slots.is_cpu or not len(self.slots):
            return 0, -1
        lowest, highest = torch.aminmax(self.slots)
        return int(lowest), int(highest)


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
    if plan.runs_triton or not runs_native(qkv):
        return reference.qk_norm_rope_store(
            qkv, k_cache, v_cache, plan.cos, plan.sin, plan.slots,
            q_norm=q_norm, k_norm=k_norm, interleaved=plan.interleaved,
        )  # fmt: skip
    from chorus.kernels.native import rope_store as native  # numba is not everywhere

    query = torch.empty(qkv.shape[0], qkv.shape[1] - 2 * k_cache.shape[1], qkv.shape[2], dtype=qkv.dtype)
    native.qk_norm_rope_store(
        query, qkv, (k_cache, v_cache), (plan.cos, plan.sin), plan.slots,
        norms=None if q_norm is None or k_norm is None else (q_norm, k_norm), interleaved=plan.interleaved,
    )  # fmt: skip
    return query


def _check(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, plan: RopePlan) -> None:
    if k_cache.dim() != 4 or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"k_cache, v_cache: want two [blocks, H_kv, block, D], got {tuple(k_cache.shape)}, {tuple(v_cache.shape)}"
        )
    (blocks, kv_heads, block, dim), dtype, device = k_cache.shape, qkv.dtype, qkv.device
    if qkv.dim() != 3 or qkv.shape[2] != dim or qkv.shape[1] <= 2 * kv_heads or not dtype.is_floating_point:
        raise ValueError(f"qkv: want [T, H + 2 * {kv_heads}, {dim}], got {dtype} {tuple(qkv.shape)}")
    (rows, heads, _), (row, head, step) = qkv.shape, qkv.stride()
    if step != 1 or head != dim or (rows > 1 and row < heads * dim):
        raise ValueError(f"qkv: a row's heads must be contiguous and rows lie apart, strides are {qkv.stride()}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if not cache.is_contiguous() or cache.dtype != dtype or cache.device != device:
            raise ValueError(f"{name}: want contiguous {dtype} on {device}")
    if rows != plan.rows or device != plan.device:
        raise ValueError(f"plan: {plan.rows} rows on {plan.device}, qkv has {rows}")
    lowest, highest = plan.ends
    if lowest < 0 or highest >= blocks * block:
        raise ValueError(f"plan: slots {lowest} to {highest} do not lie in {blocks} blocks")
    if plan.width > dim or plan.cos.dtype not in (dtype, torch.float32):
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
