"""`row_scale`, `row_add`, `row_select`: a vector of each segment's own times, plus, or in place of its rows.

All in place, on y [T, N] whose rows may lie apart (a slice of columns of a wider tensor). On CPU one gather of vectors
and one pass over the rows, whatever the number of adapters; on CUDA one launch (`triton_row_ops`).
"""

import torch
from torch import Tensor

from chorus.kernels import reference
from chorus.kernels.dispatch import TRITON_DTYPES
from chorus.kernels.row_plan import RowPlan


def row_scale(y: Tensor, vectors: Tensor, plan: RowPlan) -> Tensor:
    """y[t] *= vectors[slot] for each row of each segment; see `reference.row_scale`.

    y [T, N] is changed in place and returned; vectors [slots, N], contiguous, in y's dtype or float32.

    Raises:
        ValueError: y and vectors do not fit each other or the plan.
    """
    _check(y, vectors, plan)
    if plan.cpu is not None:
        part = plan.cpu.of(y)
        part.mul_(plan.cpu.vectors(vectors))
        return _put_back(y, part, plan)
    return _elsewhere(y, vectors, plan, "scale")


def row_add(y: Tensor, vectors: Tensor, plan: RowPlan) -> Tensor:
    """y[t] += vectors[slot] for each row of each segment; as `row_scale`."""
    _check(y, vectors, plan)
    if plan.cpu is not None:
        part = plan.cpu.of(y)
        part.add_(plan.cpu.vectors(vectors))
        return _put_back(y, part, plan)
    return _elsewhere(y, vectors, plan, "add")


def row_select(y: Tensor, vectors: Tensor, plan: RowPlan) -> Tensor:
    """y[t] = vectors[slot] for each row of each segment; as `row_scale`."""
    _check(y, vectors, plan)
    if plan.cpu is not None:
        if plan.cpu.rows is None:
            plan.cpu.of(y).copy_(plan.cpu.vectors(vectors))
        else:
            y[plan.cpu.rows] = plan.cpu.vectors(vectors).to(y.dtype)
        return y
    return _elsewhere(y, vectors, plan, "select")


def _put_back(y: Tensor, part: Tensor, plan: RowPlan) -> Tensor:
    if plan.cpu is not None and plan.cpu.rows is not None:
        y.index_copy_(0, plan.cpu.rows, part)
    return y


def _elsewhere(y: Tensor, vectors: Tensor, plan: RowPlan, does: str) -> Tensor:
    """Triton; for dtypes without a kernel and on other devices the specification."""
    if not plan.segments and plan.buffer is None:
        return y
    if plan.buffer is None or y.dtype not in TRITON_DTYPES:
        spec = {"scale": reference.row_scale, "add": reference.row_add, "select": reference.row_select}[does]
        return spec(y, vectors, plan.segments)
    if plan.entries:
        from chorus.kernels.row_launch import update_rows_op  # Triton is not everywhere

        update_rows_op(y, vectors, plan.buffer, plan.entries, does)
    return y


def _check(y: Tensor, vectors: Tensor, plan: RowPlan) -> None:
    if y.dim() != 2 or vectors.dim() != 2 or y.shape[1] != vectors.shape[1]:
        raise ValueError(f"vectors: want [slots, N] for y [T, N], got {tuple(vectors.shape)} for {tuple(y.shape)}")
    if y.shape[0] < plan.rows:
        raise ValueError(f"y: {y.shape[0]} rows, the plan was made for {plan.rows}")
    if vectors.shape[0] < plan.slots_needed:
        raise ValueError(f"vectors: {vectors.shape[0]} slots, the plan names {plan.slots_needed}")
    if vectors.dtype not in (y.dtype, torch.float32):
        raise ValueError(f"vectors: want {y.dtype}, as y, or float32; got {vectors.dtype}")
    check_rows("y", y, plan.device)
    if not vectors.is_contiguous() or vectors.device != plan.device:
        raise ValueError(f"vectors: want a contiguous tensor on {plan.device}, the plan's")


def check_rows(name: str, tensor: Tensor, device: torch.device) -> None:
    """Whether a kernel can work on the rows of a tensor [T, N].

    Raises:
        ValueError: on another device, or its rows are not contiguous or overlap.
    """
    if tensor.device != device:
        raise ValueError(f"{name}: on {tensor.device}, not on {device}")
    check_strides(name, tensor)


def check_strides(name: str, tensor: Tensor) -> None:
    """`check_rows` where the device is known."""
    if tensor.is_contiguous():
        return
    (rows, width), (apart, step) = tensor.shape, tensor.stride()
    if (width > 1 and step != 1) or (rows > 1 and apart < width):
        raise ValueError(f"{name}: rows must be contiguous and lie apart, strides are {tensor.stride()}")
