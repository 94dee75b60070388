"""Tile sizes of the kernels that work row by row, as data with its evidence. None has been measured on a GPU yet."""

from dataclasses import dataclass


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
WIDEST_NORM = NORMS[-1].columns


ROPE_VALUES, ROPE_WARPS = 1024, 4
"""Values of a program of qk_norm_rope_store. Predicted: 8 heads of 128, 16 bytes a thread of each of two reads; 32
query and 8 key heads are 6 programs a row."""


def rope_heads(dim: int) -> int:
    """Heads of a program."""
    return max(ROPE_VALUES >> (dim - 1).bit_length(), 1)


def norm_tile(width: int) -> RowTile:
    """The tile of rows of `width` columns, WIDEST_NORM at most, with its columns as few as hold them."""
    tile = next(t for t in NORMS if width <= t.columns)
    return RowTile(1 << (width - 1).bit_length(), tile.warps, tile.evidence)
