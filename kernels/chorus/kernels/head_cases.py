"""What the kernel of `head` is compiled with, without a GPU: every row of its tuning table."""

from collections.abc import Iterator
from itertools import product

import torch

from chorus.kernels import triton_head
from chorus.kernels.compile_case import TRITON_TYPES, CompileCase
from chorus.kernels.pointwise_tuning import HEAD_ROWS, head_tile


def compile_cases(arch: str) -> Iterator[CompileCase]:
    """Heads in every type, dense layers with each activation in bfloat16 and float32; bfloat16 at an odd K too."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield _case(dtype, "", 768, dense=False)
    for dtype, activation in product((torch.bfloat16, torch.float32), ("tanh", "relu", "gelu")):
        yield _case(dtype, activation, 768, dense=True)
    for dtype in (torch.bfloat16, torch.float32):
        yield _case(dtype, "", 767, dense=False)
        yield _case(dtype, "tanh", 767, dense=True)


def _case(dtype: torch.dtype, activation: str, k: int, *, dense: bool) -> CompileCase:
    tile = head_tile(dtype, k, dense=dense)
    pointers = dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "out_ptr"), f"*{TRITON_TYPES[dtype]}")
    sizes = dict.fromkeys(("x_rows", "weight_rows", "layer_rows", "K", "x_stride", "out_stride"), "i32")
    return CompileCase(
        kernel=triton_head.segment_linear,
        signature=pointers | {"tiles_ptr": "*i32"} | sizes,
        constants={
            "ACTIVATION": activation,
            "BLOCK_M": HEAD_ROWS,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
        },
        warps=tile.warps,
        stages=tile.stages,
        aligned=frozenset({*pointers, *(("K", "x_stride") if k % 16 == 0 else ())}),
        expects_dot=dtype is not torch.float32,
    )
