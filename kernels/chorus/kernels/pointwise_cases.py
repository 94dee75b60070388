"""What the kernels that work row by row are compiled with, without a GPU: every row of their tuning tables."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from chorus.kernels import reference, triton_pointwise, triton_rope_store, triton_row_ops
from chorus.kernels.compile_case import TRITON_TYPES, CompileCase
from chorus.kernels.pointwise_tuning import GATED, NORMS, ROPE_WARPS, ROW_UPDATE, RowTile, rope_heads, widest_norm

TYPES = (torch.bfloat16, torch.float16, torch.float32)


def compile_cases(arch: str) -> Iterator[CompileCase]:
    """Each type at widths that are multiples of 16, bfloat16 at odd ones too."""
    for dtype in TYPES:
        yield from _row_update_cases(dtype)
        yield from (_gated_case(dtype, activation) for activation in ("silu", "gelu_tanh"))
    yield from (_odd(case) for case in (*_row_update_cases(torch.bfloat16), _gated_case(torch.bfloat16, "silu")))
    for tile in NORMS:
        if tile.columns <= widest_norm(1):
            yield _odd(_norm_case(torch.bfloat16, tile, "layer", pooled=True))
        yield _norm_case(torch.bfloat16, tile, "rms", pooled=False)
        yield _norm_case(torch.float32, tile, "layer", pooled=True)
    for kind, pooled in (("rms", True), ("rms_plus_one", False), ("layer", True)):
        yield _norm_case(torch.bfloat16, NORMS[1], kind, pooled=pooled)
    for dtype, dim, rotary, kind, interleaved in (
        (torch.bfloat16, 64, 64, "", False),
        (torch.bfloat16, 80, 32, "", False),
        (torch.bfloat16, 128, 128, "rms", False),
        (torch.bfloat16, 128, 128, "", True),
        (torch.bfloat16, 256, 256, "rms_plus_one", False),
        (torch.float16, 128, 128, "", False),
        (torch.float32, 128, 128, "rms", False),
    ):
        yield _rope_case(dtype, dim, rotary, kind, interleaved)


def _odd(case: CompileCase) -> CompileCase:
    """The same over rows that begin anywhere, whose values are loaded one by one."""
    return replace(case, aligned=frozenset(name for name in case.aligned if name.endswith("_ptr")))


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
    absent: dict[str, None] = {} if pooled else {"table_ptr": None}
    return CompileCase(
        kernel=triton_pointwise.residual_norm,
        signature=pointers | table | sizes | {"eps": "fp32"},
        constants={"KIND": kind, **flags, "BLOCK_N": tile.columns, **absent},
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


def _rope_case(dtype: torch.dtype, dim: int, rotary: int, kind: str, interleaved: bool) -> CompileCase:
    names = ("qkv_ptr", "query_ptr", "k_cache_ptr", "v_cache_ptr", "cos_ptr", "sin_ptr")
    norms = ("q_weight_ptr", "k_weight_ptr")
    pointers = dict.fromkeys((*names, *(norms if kind else ())), f"*{TRITON_TYPES[dtype]}")
    sizes = dict.fromkeys(("qkv_stride", "angle_stride", "slots_total"), "i32")
    constants: dict[str, int | bool | str | float | None] = dict.fromkeys(() if kind else norms)
    return CompileCase(
        kernel=triton_rope_store.qk_norm_rope_store,
        signature=pointers | {"slots_ptr": "*i64"} | sizes | {"eps": "fp32"},
        constants=constants
        | {"HEADS": 32, "KV_HEADS": 8, "DIM": dim, "BLOCK": 16, "ROTARY": rotary, "KIND": kind}
        | {"INTERLEAVED": interleaved, "LIMIT": reference.KV_LIMIT}
        | {"BLOCK_H": rope_heads(dim), "BLOCK_D": 1 << (dim - 1).bit_length()},
        warps=ROPE_WARPS,
        stages=1,
        aligned=frozenset({*pointers, "slots_ptr", "qkv_stride", "angle_stride"}),
    )
