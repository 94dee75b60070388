"""What the kernels of `low_rank` are compiled with, without a GPU: every row of the tuning tables that can be met."""

from collections.abc import Iterable, Iterator
from itertools import product

import torch

from chorus.kernels import triton_low_rank as kernels
from chorus.kernels import triton_low_rank_slots as slots
from chorus.kernels.compile_case import TRITON_TYPES, CompileCase
from chorus.kernels.tuning import (
    EXPAND_RULES,
    FUSED_RULE,
    SHRINK_RULES,
    SLOT_LANES,
    Family,
    LowRankTiles,
    block_rows,
    expand_lanes,
    expand_warps,
    gradient_rule,
    low_rank_tiles,
    rank_blocks,
)

# Outputs of a launch, and whether everything of an epilogue is in it.
FORMS = ((1, False), (3, False), (1, True))
TYPES = (torch.bfloat16, torch.float16, torch.float32)
_ANY_WIDTH = 1 << 20
_VECTORS = ("out_bias_ptr", "out_scale_ptr", "row_scale_ptr", "row_add_ptr")
_TABLES = {"tiles_ptr": "*i32", "pages_ptr": "*i32"}
_TABLE_STEPS = dict.fromkeys(("tiles_step_1", "tiles_step_2", "pages_step_1", "pages_step_2"), "i64")
_BLOCK_STEPS = dict.fromkeys(("blocks_step_1", "blocks_step_2"), "i64")
_COUNTS = {"count_0": "i32", "count_1": "i32", "count_2": "i32"}
_SHRINKS = {Family.ROWS: kernels.shrink_rows, Family.SLOTS: slots.shrink_slots}
_EXPANDS = {Family.ROWS: kernels.expand_rows, Family.SLOTS: slots.expand_slots}
_STRIDES = {"columns": "i32", "member_columns": "i32", "split_stride": "i32"}


def compile_cases(arch: str) -> Iterator[CompileCase]:
    """Both kernels of every family at every width where a rule ends, and at the odd width below it."""
    widths_in = _widths(r.k_up_to for r in SHRINK_RULES)
    widths_out = _widths(r.n_up_to for r in EXPAND_RULES)
    cases: dict[str, CompileCase] = {}
    for family, dtype, k, n in product(Family, TYPES, widths_in, widths_out):
        tiles = low_rank_tiles(family, k, n, dtype, arch)
        for block, (members, full) in product(rank_blocks(family), FORMS):
            for case in (
                _shrink_case(family, dtype, block, tiles, k, members),
                _expand_case(family, dtype, block, tiles, n, members, full),
            ):
                cases[f"{case.name} {case.configuration}"] = case
    for dtype, (members, full) in product((torch.bfloat16, torch.float16), FORMS):
        case = _fused_case(dtype, members, full)
        cases[f"{case.name} {case.configuration}"] = case
    for dtype, block, k in product(TYPES, rank_blocks(Family.GROUPED), widths_in):
        case = _gradient_case(dtype, block, k)
        cases[f"{case.name} {case.configuration}"] = case
    yield from (cases[key] for key in sorted(cases))


def _widths(limits: Iterable[int | None]) -> list[int]:
    whole = {limit or _ANY_WIDTH for limit in limits}
    return sorted(whole | {width - 1 for width in whole})


def _tables(family: Family) -> dict[str, str]:
    return _TABLES | ({"blocks_ptr": "*i32"} if family is Family.SLOTS else {})


def _table_steps(family: Family) -> dict[str, str]:
    return _TABLE_STEPS | (_BLOCK_STEPS if family is Family.SLOTS else {})


def _shrink_case(
    family: Family, dtype: torch.dtype, block: int, tiles: LowRankTiles, width: int, members: int
) -> CompileCase:
    value = f"*{TRITON_TYPES[dtype]}"
    pointers = {"x_ptr": value, "a_ptr": value, "scale_ptr": "*fp32", "partial_ptr": "*fp32"} | _tables(family)
    sizes = {"x_rows": "i32", "pool_rows": "i32", "K": "i32"} | _COUNTS
    steps = _table_steps(family) | dict.fromkeys(("a_step_1", "a_step_2", "scale_step_1", "scale_step_2"), "i64")
    rows = {} if family is Family.ROWS else {"BLOCK_M": block_rows(family)}
    lanes = {"BLOCK_R": SLOT_LANES, "CHUNK": block} if family is Family.SLOTS else {"BLOCK_R": block}
    return CompileCase(
        kernel=_SHRINKS.get(family, kernels.shrink_tiles),
        signature=pointers | sizes | _STRIDES | steps,
        constants=rows | lanes | {"BLOCK_K": tiles.block_k, "SPLIT_K": tiles.split_k, "MEMBERS": members},
        warps=tiles.shrink_warps,
        stages=tiles.shrink_stages,
        aligned=frozenset({*pointers, *_STRIDES, *steps, *(["K"] if width % 16 == 0 else [])}),
        expects_dot=family is not Family.ROWS and dtype is not torch.float32,
    )


def _expand_case(
    family: Family, dtype: torch.dtype, block: int, tiles: LowRankTiles, width: int, members: int, full: bool
) -> CompileCase:
    value = f"*{TRITON_TYPES[dtype]}"
    pointers = {"y_ptr": value, "b_ptr": value, "partial_ptr": "*fp32"} | _tables(family)
    epilogue = {"mid_bias_ptr": "*fp32"} | dict.fromkeys(_VECTORS, value)
    sizes = {"y_rows": "i32", "pool_rows": "i32"} | _COUNTS
    widths = dict.fromkeys(("N_0", "N_1", "N_2", "y_stride_0", "y_stride_1", "y_stride_2"), "i32")
    steps = _table_steps(family) | dict.fromkeys(("b_step_1", "b_step_2"), "i64")
    columns = dict.fromkeys(("y_step_1", "y_step_2"), "i64")
    block, stages = expand_lanes(block, tiles.expand_stages, dtype, between=full)
    rows = {} if family is Family.ROWS else {"BLOCK_M": block_rows(family)}
    return CompileCase(
        kernel=_EXPANDS.get(family, kernels.expand_tiles),
        signature=pointers | sizes | _STRIDES | widths | steps | columns | (epilogue if full else {}),
        constants=rows
        | {"BLOCK_R": block, "BLOCK_N": tiles.block_n, "SPLIT_K": tiles.split_k, "MEMBERS": members, "ACTIVATED": full}
        | ({} if full else dict.fromkeys(epilogue)),
        warps=expand_warps(family, tiles.expand_warps, between=full),
        stages=stages,
        aligned=frozenset(
            {
                *pointers,
                *_STRIDES,
                *steps,
                *(epilogue if full else ()),
                *([*widths, *columns] if width % 16 == 0 else ()),
            }
        ),
        expects_dot=family is not Family.ROWS and dtype is not torch.float32,
    )


def _fused_case(dtype: torch.dtype, members: int, full: bool) -> CompileCase:
    value = f"*{TRITON_TYPES[dtype]}"
    pointers = dict.fromkeys(("y_ptr", "x_ptr", "a_ptr", "b_ptr"), value) | {"scale_ptr": "*fp32"} | _TABLES
    epilogue = {"mid_bias_ptr": "*fp32"} | dict.fromkeys(_VECTORS, value)
    widths = dict.fromkeys(("K", "N_0", "N_1", "N_2", "y_stride_0", "y_stride_1", "y_stride_2"), "i32")
    of_members = (
        "a_step_1",
        "a_step_2",
        "scale_step_1",
        "scale_step_2",
        "b_step_1",
        "b_step_2",
        "y_step_1",
        "y_step_2",
    )
    steps = _TABLE_STEPS | dict.fromkeys(of_members, "i64")
    used = pointers | (epilogue if full else {})
    sizes = {"BLOCK_R": 16, "BLOCK_K": FUSED_RULE.block_k, "BLOCK_N": FUSED_RULE.block_n}
    return CompileCase(
        kernel=kernels.fused_rows,
        signature=used | {"y_rows": "i32", "pool_rows": "i32"} | _COUNTS | widths | steps,
        constants=sizes | {"MEMBERS": members, "ACTIVATED": full} | ({} if full else dict.fromkeys(epilogue)),
        warps=FUSED_RULE.warps,
        stages=FUSED_RULE.stages,
        aligned=frozenset({*used, *widths, *steps}),
    )


def _gradient_case(dtype: torch.dtype, block: int, width: int) -> CompileCase:
    rule = gradient_rule(width, dtype)
    value = f"*{TRITON_TYPES[dtype]}"
    pointers = {"x_ptr": value, "s_ptr": "*fp32", "out_ptr": value, "tiles_ptr": "*i32", "pages_ptr": "*i32"}
    return CompileCase(
        kernel=kernels.weight_gradient,
        signature=pointers | {"x_rows": "i32", "pool_rows": "i32", "K": "i32", "columns": "i32"},
        constants={"BLOCK_M": rule.block_m, "BLOCK_R": block, "BLOCK_K": rule.block_k},
        warps=rule.warps,
        stages=rule.stages,
        aligned=frozenset({*pointers, "columns", *(["K"] if width % 16 == 0 else [])}),
        expects_dot=dtype is not torch.float32,
    )
