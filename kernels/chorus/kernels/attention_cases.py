"""What the attention kernels are compiled with, without a GPU: every row of the tuning table, the head sizes in use."""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch

from chorus.kernels import reference
from chorus.kernels import triton_attention as kernels
from chorus.kernels.attention_tables import decode_rows_of_tile, heads_of_tile, rows_of_tile
from chorus.kernels.attention_tuning import PREFILL, STORE_COLUMNS, attend_tiles
from chorus.kernels.compile_case import TRITON_TYPES, CompileCase

BLOCK, KV_HEADS = 16, 8
# Phi's 80, Gemma's 256; 1 and 4 query heads a key head.
SHAPES = [(dim, group, special) for dim, group, special in product((64, 80, 128, 256), (1, 4), (False, True))]


class Kind(NamedTuple):
    """What attends: with a bias, causally, over packed keys."""

    biased: bool = False
    causal: bool = True
    packed: bool = False


PLAIN = Kind()


def compile_cases(arch: str) -> Iterator[CompileCase]:
    """bfloat16 at every shape, with and without window and cap; the other types at one or two."""
    for dim, group, special in SHAPES:
        yield from _attend_cases(torch.bfloat16, dim, group, special, arch)
    yield from _attend_cases(torch.float16, 128, 4, True, arch)
    for dim in (64, 128):
        yield from _attend_cases(torch.float32, dim, 4, True, arch)
    # Heads of 64, one to a key head: T5's decoder, its cross-attention, its encoder; BERT's. The largest T5 has 128.
    for kind in (Kind(biased=True), Kind(causal=False), Kind(True, False, True), Kind(False, False, True)):
        for dtype, dim in ((torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 64)):
            yield from _attend_cases(dtype, dim, 1, False, arch, kind)
    for dtype in TRITON_TYPES:
        if dtype.is_floating_point:
            yield _store_case(dtype)
    yield _combine_case(128)
    yield _combine_case(80)


def _attend_cases(
    dtype: torch.dtype, dim: int, group: int, special: bool, arch: str, kind: Kind = PLAIN
) -> Iterator[CompileCase]:
    tiles = attend_tiles(dim, dtype, arch)
    assert tiles is not None
    value = f"*{TRITON_TYPES[dtype]}"
    pointers = {"query_ptr": value, "k_cache_ptr": value, "v_cache_ptr": value, "out_ptr": value}
    workspaces = {"partial_ptr": "*fp32", "lse_ptr": "*fp32", "bias_ptr": "*fp32"}
    tables = {"items_ptr": "*i32", "pages_ptr": "*i32"}
    sizes = {"rows_total": "i32", "pages_total": "i32", "scale": "fp32", "window": "i32", "soft_cap": "fp32"}
    sizes["furthest"] = "i32"
    for rows in (decode_rows_of_tile(group), rows_of_tile(PREFILL.block_m, group)):
        yield CompileCase(
            kernel=kernels.attend,
            signature=pointers | workspaces | tables | sizes,
            constants={
                "KV_HEADS": KV_HEADS,
                "GROUP": group,
                "DIM": dim,
                "BLOCK": 1 if kind.packed else BLOCK,
                "BLOCK_M": rows,
                "BLOCK_G": heads_of_tile(group),
                "BLOCK_N": tiles.block_n,
                "BLOCK_D": 1 << (dim - 1).bit_length(),
                "HAS_WINDOW": special,
                "HAS_CAP": special,
                "HAS_BIAS": kind.biased,
                "CAUSAL": kind.causal,
                "PACKED": kind.packed,
            },
            warps=tiles.warps,
            stages=tiles.stages,
            aligned=frozenset({*pointers, *workspaces}),
            expects_dot=dtype is not torch.float32,
        )


def _store_case(dtype: torch.dtype) -> CompileCase:
    value = f"*{TRITON_TYPES[dtype]}"
    pointers = {"key_ptr": value, "value_ptr": value, "k_cache_ptr": value, "v_cache_ptr": value}
    strides = dict.fromkeys(("key_stride_t", "key_stride_h", "value_stride_t", "value_stride_h"), "i32")
    return CompileCase(
        kernel=kernels.store_kv,
        signature=pointers | {"slots_ptr": "*i64"} | strides | {"slots_total": "i32"},
        constants={
            "HEADS": KV_HEADS,
            "DIM": 128,
            "BLOCK": BLOCK,
            "LIMIT": reference.KV_LIMIT,
            "BLOCK_C": STORE_COLUMNS,
        },
        warps=4,
        stages=1,
        aligned=frozenset({*pointers, *strides}),
    )


def _combine_case(dim: int) -> CompileCase:
    pointers = {"out_ptr": "*bf16", "partial_ptr": "*fp32", "lse_ptr": "*fp32", "merges_ptr": "*i32"}
    return CompileCase(
        kernel=kernels.combine,
        signature=pointers,
        constants={"HEADS": KV_HEADS * 4, "DIM": dim, "BLOCK_D": 1 << (dim - 1).bit_length()},
        warps=4,
        stages=1,
        aligned=frozenset(pointers),
    )
