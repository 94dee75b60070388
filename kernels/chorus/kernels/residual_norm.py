"""`residual_norm`: adds a sublayer's output to the residual stream and norms the sum, with versions' own norm vectors.

    residual += x        out = norm(residual) * weight (+ bias), weight and bias by row where a segment has its own

Three norms, each rounded where transformers rounds it, so that models keep their numbers: RMSNorm as Llama has it,
Gemma's with (1 + weight), LayerNorm. One launch, of a compiled kernel on a CPU (`native.residual_norm`), of Triton's on
CUDA; in float32 on a CPU it is torch's own norm and a product (`dispatch` says why).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from chorus.kernels import reference
from chorus.kernels.dispatch import TRITON_DTYPES, runs_native, runs_triton
from chorus.kernels.pointwise_tuning import widest_norm
from chorus.kernels.row_ops import check_rows, check_strides
from chorus.kernels.row_plan import CpuRows, RowPlan
from chorus.kernels.types import Norm


def residual_norm(
    residual: Tensor, x: Tensor | None, norm: Norm, plan: RowPlan | None = None, *, triton: bool | None = None
) -> Tensor:
    """norm(residual + x), a new tensor [T, N]; `residual` becomes the sum. See `reference.residual_norm`.

    residual, x [T, N], x None where there is nothing to add; their rows may lie apart. `plan` says which rows have
    vectors of their own in the norm's pools; its own choice of Triton wins over `triton` (on CUDA if None).

    Raises:
        ValueError: the tensors do not fit each other or the plan, or rows are longer than a kernel takes.
    """
    _check(residual, x, norm, plan)
    uses_pool = plan is not None and norm.weights is not None and (bool(plan.segments) or plan.buffer is not None)
    pooled = plan if uses_pool else None
    asked = triton if plan is None else plan.runs_triton
    if not asked and runs_native(residual, rounds=True):
        from chorus.kernels.native import residual_norm as native  # numba is not everywhere

        out = torch.empty_like(residual, memory_format=torch.contiguous_format)
        native.residual_norm(out, residual, x, norm, None if pooled is None else pooled.slot_of_row)
        return out
    on_triton = runs_triton(residual.device, asked)
    if on_triton and residual.dtype in TRITON_DTYPES:
        return _on_triton(residual, x, norm, pooled)
    if residual.device.type != "cpu" or on_triton:
        return reference.residual_norm(residual, x, norm, plan.segments if plan is not None else ())
    if x is not None:
        residual.add_(x)
    return _on_cpu(residual, norm, pooled)


def _on_triton(residual: Tensor, x: Tensor | None, norm: Norm, plan: RowPlan | None) -> Tensor:
    from chorus.kernels.pointwise_launch import residual_norm_op  # Triton is not everywhere

    width = residual.shape[1]
    if width > widest_norm(width):
        raise ValueError(f"residual: rows of {width}, the kernel takes up to {widest_norm(width)}")
    weights, biases, table, at = None, None, None, 0
    if plan is not None:
        weights, biases, table, at = norm.weights, norm.biases, plan.buffer, 2 * plan.entries
    out: Tensor = residual_norm_op(residual, x, norm.weight, norm.bias, weights, biases, table, at, norm.kind, norm.eps)
    return out


def _on_cpu(h: Tensor, norm: Norm, plan: RowPlan | None) -> Tensor:
    if plan is None or plan.cpu is None:
        return _base(h, norm)
    rows = plan.cpu
    own = _own(rows.of(h), norm, rows)
    if rows.total == len(h):
        return own
    out = _base(h, norm)
    if rows.rows is None:
        out[rows.first : rows.first + rows.total] = own
        return out
    return out.index_copy_(0, rows.rows, own)


def _base(h: Tensor, norm: Norm) -> Tensor:
    """With the base's vectors. torch rounds an RMSNorm after its weight; transformers' Llama rounds before it too."""
    shape = h.shape[1:]
    if norm.kind == "rms":
        return F.rms_norm(h, shape, None, norm.eps).mul_(norm.weight)
    if norm.kind == "layer":
        return F.layer_norm(h, shape, norm.weight, norm.bias, norm.eps)
    scale = norm.one_plus_weight
    return F.rms_norm(h.to(scale.dtype), shape, scale, norm.eps).to(h.dtype)


def _own(h: Tensor, norm: Norm, rows: CpuRows) -> Tensor:
    """With each row's own."""
    shape, weights = h.shape[1:], norm.weights
    assert weights is not None
    weight = rows.vectors(weights)
    if norm.kind == "rms":
        return F.rms_norm(h, shape, None, norm.eps).mul_(weight)
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    if norm.kind == "rms_plus_one":
        normed = F.rms_norm(wide, shape, None, norm.eps)
        return normed.addcmul_(normed, weight.to(wide.dtype)).to(h.dtype)
    normed = F.layer_norm(wide, shape, None, None, norm.eps).mul_(weight)
    return (normed if norm.biases is None else normed.add_(rows.vectors(norm.biases))).to(h.dtype)


def _check(residual: Tensor, x: Tensor | None, norm: Norm, plan: RowPlan | None) -> None:
    if residual.dim() != 2:
        raise ValueError(f"residual: want [T, N], got {tuple(residual.shape)}")
    weight = norm.weight
    if weight.shape != residual.shape[1:] or weight.dtype != residual.dtype or weight.device != residual.device:
        raise ValueError(
            f"norm: made for {weight.dtype} [T, {len(weight)}] on {weight.device}, "
            f"residual is {residual.dtype} {tuple(residual.shape)} on {residual.device}"
        )
    check_strides("residual", residual)
    if x is not None:
        if x.shape != residual.shape or x.dtype != residual.dtype:
            raise ValueError(f"x: want {residual.dtype} {tuple(residual.shape)}, got {x.dtype} {tuple(x.shape)}")
        check_rows("x", x, weight.device)
    if plan is not None:
        _check_plan(residual, norm.slots, plan)


def _check_plan(residual: Tensor, slots: int, plan: RowPlan) -> None:
    rows = residual.shape[0]
    if plan.device != residual.device:
        raise ValueError(f"plan: on {plan.device}, residual is on {residual.device}")
    if rows < plan.rows or (plan.buffer is not None and rows > plan.size):
        raise ValueError(f"plan: made for {plan.rows} rows of at most {plan.size}, residual has {rows}")
    if plan.slots_needed > slots:
        raise ValueError(f"norm: weights have {slots} slots, the plan names {plan.slots_needed}")
