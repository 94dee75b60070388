"""What the kernels that work row by row are compiled with, without a GPU: every row of their tuning tables."""

from collections.abc import Iterator

import torch

from chorus.kernels import triton_row_ops
from chorus.kernels.compile_case import TRITON_TYPES, CompileCase
from chorus.kernels.pointwise_tuning import ROW_UPDATE

TYPES = (torch.bfloat16, torch.float16, torch.float32)


def compile_cases(arch: str) -> Iterator[CompileCase]:
    """Each type at widths that are multiples of 16, bfloat16 at others too."""
    for dtype in TYPES:
        yield from _row_update_cases(dtype)


def _row_update_cases(dtype: torch.dtype) -> Iterator[CompileCase]:
    """Vectors in the rows' own type, and in float32."""
    value = f"*{TRITON_TYPES[dtype]}"
    for does, vectors in (("scale", "*fp32"), ("add", value), ("select", value)):
        yield CompileCase(
            kernel=triton_row_ops.update_rows,
            signature={"y_ptr": value, "vectors_ptr": vectors, "entries_ptr": "*i32"}
            | dict.fromkeys(("y_rows", "slots", "N", "y_stride"), "i32"),
            constants={"DOES": does, "BLOCK_N": ROW_UPDATE.columns},
            warps=ROW_UPDATE.warps,
            stages=1,
            aligned=frozenset({"y_ptr", "vectors_ptr", "entries_ptr", "N", "y_stride"}),
        )
