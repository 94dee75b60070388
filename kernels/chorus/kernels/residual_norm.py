"""`residual_norm`: adds a sublayer's output to the residual stream and norms the sum, with versions' own norm vectors.

    residual += x        out = norm(residual) * weight (+ bias), weight and bias by row where a segment has its own

Three norms, each rounded where transformers rounds it, so that models keep their numbers: RMSNorm as Llama has it,
Gemma's with (1 + weight), LayerNorm. On CPU that is torch's own norm and a product; on CUDA one launch.
"""

from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from chorus.kernels import reference
from chorus.kernels.pointwise_tuning import WIDEST_NORM
from chorus.kernels.row_ops import TRITON_DTYPES, check_rows
from chorus.kernels.row_plan import RowPlan
from chorus.kernels.types import Norm, NormKind


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
    runs_triton = residual.device.type == "cuda" if triton is None else triton
    if plan is not None:
        runs_triton = plan.runs_triton
    if runs_triton and residual.dtype in TRITON_DTYPES:
        return _on_triton(residual, x, norm, plan if uses_pool else None)
    if residual.device.type != "cpu" or runs_triton:
        return reference.residual_norm(residual, x, norm, plan.segments if plan is not None else ())
    if x is not None:
        residual.add_(x)
    return _on_cpu(residual, norm, plan if uses_pool else None)


def _on_triton(residual: Tensor, x: Tensor | None, norm: Norm, plan: RowPlan | None) -> Tensor:
    from chorus.kernels.pointwise_launch import residual_norm_op  # Triton is not everywhere

    if residual.shape[1] > WIDEST_NORM:
        raise ValueError(f"residual: rows of {residual.shape[1]}, the kernel takes up to {WIDEST_NORM}")
    weights, biases, table, at = None, None, None, 0
    if plan is not None:
        weights, biases, table, at = norm.weights, norm.biases, plan.buffer, 2 * plan.entries
    out: Tensor = residual_norm_op(residual, x, norm.weight, norm.bias, weights, biases, table, at, norm.kind, norm.eps)
    return out


def _on_cpu(h: Tensor, norm: Norm, plan: RowPlan | None) -> Tensor:
    if plan is None or plan.cpu is None:
        return _normed(h, norm.kind, norm.weight, norm.bias, norm.eps)
    rows, weights = plan.cpu, norm.weights
    assert weights is not None
    biases = None if norm.biases is None else rows.vectors(norm.biases)
    own = _normed(rows.of(h), norm.kind, rows.vectors(weights), biases, norm.eps)
    if rows.total == len(h):
        return own
    out = _normed(h, norm.kind, norm.weight, norm.bias, norm.eps)
    if rows.rows is None:
        out[rows.first : rows.first + rows.total] = own
        return out
    return out.index_copy_(0, rows.rows, own)


def _normed(h: Tensor, kind: NormKind, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """weight and bias [N], or one for each row."""
    shape = h.shape[1:]
    if kind == "rms":
        return F.rms_norm(h, shape, None, eps).mul_(weight)
    if kind == "layer" and weight.dim() == 1:
        return F.layer_norm(h, shape, weight, bias, eps)
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    if kind == "rms_plus_one":
        normed = F.rms_norm(wide, shape, None, eps)
        return normed.addcmul_(normed, weight.to(wide.dtype)).to(h.dtype)
    normed = F.layer_norm(wide, shape, None, None, eps).mul_(weight)
    return (normed if bias is None else normed.add_(bias)).to(h.dtype)


def _check(residual: Tensor, x: Tensor | None, norm: Norm, plan: RowPlan | None) -> None:
    if residual.dim() != 2 or not residual.is_floating_point():
        raise ValueError(f"residual: want a floating tensor [T, N], got {residual.dtype} {tuple(residual.shape)}")
    if x is not None and (x.shape != residual.shape or x.dtype != residual.dtype):
        raise ValueError(f"x: want {residual.dtype} {tuple(residual.shape)}, got {x.dtype} {tuple(x.shape)}")
    for name, rows in (("residual", residual), ("x", x)):
        if rows is not None:
            check_rows(name, rows, residual.device)
    if norm.kind not in get_args(NormKind):
        raise ValueError(f"norm: kind {norm.kind!r} is none of {get_args(NormKind)}")
    if norm.kind != "layer" and (norm.bias is not None or norm.biases is not None):
        raise ValueError(f"norm: {norm.kind} has no bias")
    if norm.weights is not None and (norm.bias is None) != (norm.biases is None):
        raise ValueError("norm: bias and biases come together")
    slots = 0 if norm.weights is None else norm.weights.shape[0]
    width = residual.shape[1]
    shapes = {"weight": (width,), "bias": (width,), "weights": (slots, width), "biases": (slots, width)}
    for name, shape in shapes.items():
        vector: Tensor | None = getattr(norm, name)
        if vector is not None and (
            vector.shape != shape
            or vector.dtype != residual.dtype
            or vector.device != residual.device
            or not vector.is_contiguous()
        ):
            raise ValueError(f"norm: {name} must be {shape}, contiguous, {residual.dtype}, on {residual.device}")
    if plan is not None:
        _check_plan(residual, slots, plan)


def _check_plan(residual: Tensor, slots: int, plan: RowPlan) -> None:
    rows = residual.shape[0]
    if plan.device != residual.device:
        raise ValueError(f"plan: on {plan.device}, residual is on {residual.device}")
    if rows < plan.rows or (plan.buffer is not None and rows > plan.size):
        raise ValueError(f"plan: made for {plan.rows} rows of at most {plan.size}, residual has {rows}")
    if plan.slots_needed > slots:
        raise ValueError(f"norm: weights have {slots} slots, the plan names {plan.slots_needed}")
