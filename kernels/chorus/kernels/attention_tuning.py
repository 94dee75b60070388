"""Tile sizes of the attention kernels, as data with its evidence. Nothing here has been measured on a GPU yet."""

from dataclasses import dataclass

import torch

SPLIT_TOKENS = 512
"""A decode's context is cut at multiples of this, whatever the batch.

Predicted: at Llama-3-8B's 8 key heads and 2k of context 64 rows are 2048 programs and one row 32; a range reads 256 KB,
against 4 KB of partial results written and read again."""

STORE_COLUMNS = 1024
"""Keys or values of a program of store_kv. Predicted: all of a row at 8 heads of 128; 2 KB each."""


@dataclass(frozen=True, slots=True)
class AttendRule:
    """Rows of a tile (tokens times query heads of a key head), and the least that one is launched with."""

    block_m: int
    evidence: str


DECODE = AttendRule(16, "the least a matrix instruction takes; 4 heads fill a quarter of it, but bytes bound it anyway")
PREFILL = AttendRule(64, "predicted: 16 tokens of 4 heads each read K and V once; 128 rows spill at head size 256")


@dataclass(frozen=True, slots=True)
class AttendTiles:
    """Positions at a time, warps, stages, for head sizes up to `dim_up_to`, values of `itemsize` bytes, on `arch`."""

    itemsize: int
    dim_up_to: int
    arch: str
    block_n: int
    warps: int
    stages: int
    evidence: str


_HIP = "gfx942: with 32 positions the masks spill scalar registers"
_FMA = "fp32 is for exactness: it runs on FMA, and larger tiles spill"
ATTEND_TILES = (
    AttendTiles(2, 128, "hip", 16, 4, 1, _HIP),
    AttendTiles(2, 256, "hip", 16, 8, 1, _HIP),
    AttendTiles(2, 64, "", 64, 4, 3, "predicted: 16 KB of K and V a stage"),
    AttendTiles(2, 128, "sm100", 64, 4, 2, "predicted: 32 KB of K and V a stage; 8 warps spill"),
    AttendTiles(2, 128, "sm80", 64, 8, 3, "predicted: 32 KB of K and V a stage; with 2 stages cross-attention spills"),
    AttendTiles(2, 128, "", 64, 8, 2, "predicted: 32 KB of K and V a stage; 4 warps spill on sm80"),
    AttendTiles(2, 256, "", 32, 8, 2, "predicted: 32 KB of K and V a stage"),
    AttendTiles(4, 64, "sm80", 16, 4, 1, _FMA + "; 8 warps spill without causality"),
    AttendTiles(4, 64, "sm90", 16, 16, 1, _FMA + "; 8 warps spill with a bias over packed keys, 4 without causality"),
    AttendTiles(4, 128, "", 16, 8, 1, _FMA),
)


def attend_tiles(dim: int, dtype: torch.dtype, arch: str) -> AttendTiles | None:
    """The first row of the table that fits; None where no kernel is made: float64, float32 of heads over 128."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return None
    fitting = (
        r for r in ATTEND_TILES if r.itemsize == dtype.itemsize and dim <= r.dim_up_to and arch.startswith(r.arch)
    )
    return next(fitting, None)
