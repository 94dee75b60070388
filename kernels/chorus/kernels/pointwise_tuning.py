"""Tile sizes of the kernels that work row by row, and of heads, as data with its evidence.

None has been measured on a GPU yet.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class RowTile:
    """Columns of a row that one program works on, and its warps."""

    columns: int
    warps: int
    evidence: str


ROW_UPDATE = RowTile(1024, 4, "predicted: 16 bytes a thread of y and of the vector; N 4096 is 4 programs a row")
GATED = RowTile(1024, 4, "predicted: 16 bytes a thread of gate and of up; N 14336 is 14 programs a row")

# Rows are normed whole: columns are the widest row that a tile takes, rounded up to a power of two.
NORMS = (
    RowTile(1024, 4, "predicted: 16 bytes a thread; a decode step is one program a row, bound by latency"),
    RowTile(4096, 8, "predicted: 32 bytes a thread of residual and of x, two loads each in flight"),
    RowTile(8192, 16, "predicted: as 4096"),
    RowTile(16384, 16, "predicted: 64 bytes a thread; the values stay in registers between the passes"),
)


def widest_norm(width: int) -> int:
    """Columns that a row of `width` may have: 16384 values loaded one by one spill."""
    return NORMS[-1 if width % 16 == 0 else -2].columns


ROPE_VALUES, ROPE_WARPS = 1024, 4
"""Values of a program of qk_norm_rope_store. Predicted: 8 heads of 128, 16 bytes a thread of each of two reads; 32
query and 8 key heads are 6 programs a row."""


def rope_heads(dim: int) -> int:
    """Heads of a program."""
    return max(ROPE_VALUES >> (dim - 1).bit_length(), 1)


def norm_tile(width: int) -> RowTile:
    """The tile of rows of `width` columns, `widest_norm` at most, with its columns as few as hold them."""
    tile = next(t for t in NORMS if width <= t.columns)
    return RowTile(1 << (width - 1).bit_length(), tile.warps, tile.evidence)


HEAD_ROWS = 16
"""Rows of a tile of `head`, the least a matrix instruction takes. Predicted: decode-like batches have one row a head;
per-token heads read their few label rows again, from L2."""


@dataclass(frozen=True, slots=True)
class HeadTile:
    """Outputs of a program and K at a time, for values of `itemsize` bytes, in a dense layer or a head.

    `vectors` is False for a K that is no multiple of 16: its rows begin anywhere, so they are loaded one by one.
    """

    itemsize: int
    vectors: bool
    dense: bool
    block_n: int
    block_k: int
    warps: int
    stages: int
    evidence: str


_FMA = "fp32 is for exactness: it runs on FMA, and larger tiles spill"
_ODD = "an odd K is for small models and tests: larger tiles spill"
HEAD_TILES = (
    HeadTile(2, True, True, 32, 128, 4, 3, "predicted: 8 KB of weights a stage; K of 768 is 24 programs a tile"),
    HeadTile(2, True, False, 16, 128, 4, 3, "predicted: most heads have under 16 labels; 4 KB of weights a stage"),
    HeadTile(2, False, True, 16, 64, 4, 2, _ODD),
    HeadTile(2, False, False, 16, 64, 4, 2, _ODD),
    HeadTile(4, True, True, 16, 64, 4, 2, _FMA),
    HeadTile(4, True, False, 16, 64, 4, 2, _FMA),
    HeadTile(4, False, True, 16, 64, 4, 2, _FMA),
    HeadTile(4, False, False, 16, 64, 4, 2, _FMA),
)


def head_tile(dtype: torch.dtype, k: int, *, dense: bool) -> HeadTile:
    """The row of the table that fits; float16, bfloat16 and float32 have one."""
    kind = (dtype.itemsize, k % 16 == 0, dense)
    return next(t for t in HEAD_TILES if (t.itemsize, t.vectors, t.dense) == kind)
