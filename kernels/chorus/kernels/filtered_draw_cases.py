"""What the kernels of `filtered_draw` are compiled with, without a GPU."""

from collections.abc import Iterator

from chorus.kernels import filtered_draw_launch as how
from chorus.kernels import triton_filtered_draw as kernels
from chorus.kernels.compile_case import CompileCase

FILTERS = {"totals_ptr": "*fp32", "top_k_ptr": "*i64", "top_p_ptr": "*fp64"}
BETWEEN = {"gathered_ptr": "*fp32", "ids_ptr": "*i32", "found_ptr": "*i32"}


def compile_cases(arch: str) -> Iterator[CompileCase]:
    """One of each: neither vocabulary nor rows are compiled in."""
    gather = {"weights_ptr": "*fp32", **FILTERS, **BETWEEN, "V": "i32"}
    draw = {**BETWEEN, **FILTERS, "noise_ptr": "*fp64", "out_ptr": "*i64", "V": "i32"}
    pointers = frozenset(name for name in gather | draw if name.endswith("_ptr"))
    yield CompileCase(
        kernel=kernels.gather_likeliest,
        signature=gather,
        constants={"START": how.START, "STEP": how.STEP, "BLOCK": how.GATHER_BLOCK},
        warps=how.GATHER_WARPS,
        stages=1,
        aligned=pointers & gather.keys(),
    )
    yield CompileCase(
        kernel=kernels.draw_likeliest,
        signature=draw,
        constants={"LARGEST": how.LARGEST, "BLOCK": how.DRAW_BLOCK},
        warps=how.DRAW_WARPS,
        stages=1,
        aligned=pointers & draw.keys(),
    )
