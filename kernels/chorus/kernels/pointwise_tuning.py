"""Tile sizes of the kernels that work row by row, as data with its evidence. None has been measured on a GPU yet."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RowTile:
    """Columns of a row that one program works on, and its warps."""

    columns: int
    warps: int
    evidence: str


ROW_UPDATE = RowTile(1024, 4, "predicted: 16 bytes a thread of y and of the vector; N 4096 is 4 programs a row")
