"""What the kernels that work row by row are compiled with, without a GPU: every row of their tuning tables."""

from collections.abc import Iterator

import torch

from chorus.kernels import triton_pointwise, triton_row_ops
from chorus.kernels.compile_case import TRITON_TYPES, CompileCase
from chorus.kernels.pointwise_tuning import GATED, NORMS, ROW_UPDATE, RowTile

TYPES = (torch.bfloat16, torch.float16, torch.float32)


def compile_cases(arch: str) -> Iterator[CompileCase]:
    """Each type at widths that are multiples of 16, bfloat16 at others too."""
    for dtype in TYPES:
        yield from _row_update_cases(dtype)
        yield from (_gated_case(dtype, activation) for activation in ("silu", "gelu_tanh"))
    for tile in NORMS:
        yield _norm_case(torch.bfloat16, tile, "rms", pooled=False)
        yield _norm_case(torch.float32, tile, "layer", pooled=True)
    for kind, pooled in (("rms", True), ("rms_plus_one", False), ("layer", True)):
        yield _norm_case(torch.bfloat16, NORMS[1], kind, pooled=pooled)


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


def _norm_case(dtype: torch.dtype, tile: RowTile, kind: str, *, pooled: bool) -> CompileCase:
    names = ("residual_ptr", "x_ptr", "out_ptr", "weight_ptr", "bias_ptr", "weights_ptr", "biases_ptr")
    pointers = dict.fromkeys(names, f"*{TRITON_TYPES[dtype]}")
    sizes = dict.fromkeys(("slots_at", "slots_total", "residual_stride", "x_stride", "N"), "i32")
    flags = {"HAS_X": True, "HAS_BIAS": kind == "layer", "HAS_POOL": pooled}
    table = {"table_ptr": "*i32"} if pooled else {}
    return CompileCase(
        kernel=triton_pointwise.residual_norm,
        signature=pointers | table | sizes | {"eps": "fp32"},
        constants={"KIND": kind, **flags, "BLOCK_N": tile.columns} | ({} if pooled else {"table_ptr": None}),
        warps=tile.warps,
        stages=1,
        aligned=frozenset({*pointers, "residual_stride", "x_stride", "N"}),
    )


def _gated_case(dtype: torch.dtype, activation: str) -> CompileCase:
    pointers = dict.fromkeys(("gate_ptr", "up_ptr", "out_ptr"), f"*{TRITON_TYPES[dtype]}")
    sizes = dict.fromkeys(("gate_stride", "up_stride", "N"), "i32")
    return CompileCase(
        kernel=triton_pointwise.gated_mul,
        signature=pointers | sizes,
        constants={"ACTIVATION": activation, "BLOCK_N": GATED.columns},
        warps=GATED.warps,
        stages=1,
        aligned=frozenset({*pointers, *sizes}),
    )
