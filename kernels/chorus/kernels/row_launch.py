"""Launches `update_rows`: a custom op, so that torch.compile and CUDA graphs see one call that changes y."""

import torch
from torch import Tensor

from chorus.kernels import triton_row_ops as kernels
from chorus.kernels.low_rank_launch import launch_options
from chorus.kernels.pointwise_tuning import ROW_UPDATE


@torch.library.custom_op("chorus::update_rows", mutates_args=("y",))
def update_rows_op(y: Tensor, vectors: Tensor, table: Tensor, entries: int, does: str) -> None:
    """y [T, N] by a `RowPlan`'s table; `does` is "scale", "add" or "select". Its arguments are not checked."""
    width = y.shape[1]
    with torch.cuda.device_of(y):
        kernels.update_rows[(entries, -(-width // ROW_UPDATE.columns))](
            y_ptr=y,
            vectors_ptr=vectors,
            entries_ptr=table,
            y_rows=y.shape[0],
            slots=vectors.shape[0],
            N=width,
            y_stride=y.stride(0),
            DOES=does,
            BLOCK_N=ROW_UPDATE.columns,
            **launch_options(ROW_UPDATE.warps, 1),
        )


@update_rows_op.register_fake
def _(y: Tensor, vectors: Tensor, table: Tensor, entries: int, does: str) -> None:
    return None
