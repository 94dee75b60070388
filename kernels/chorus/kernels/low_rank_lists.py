"""The lists that a family's programs work off: tiles of segments, and for SLOTS blocks of the batch's rows.

tile   row | rows | first entry in the page table | rank lanes | first column of s | activation | vector, or -1
block  first tile | end of its tiles; both 0 where no segment has a row of it
"""

from collections.abc import Sequence

from chorus.kernels.tuning import Family, block_rows
from chorus.kernels.types import LowRankSegment

PAGE_ROWS = 8
TILE_FIELDS = 7
BLOCK_FIELDS = 2

Placed = tuple[LowRankSegment, int]
"""A segment, and its first entry in the page table."""


def tile_lists(placed: Sequence[Placed], family: Family, block_rank: int) -> tuple[list[int], list[int]]:
    """Tiles of the shrink, cut by rows and by rank, and of the expand, cut by rows alone."""
    shrinks: list[int] = []
    expands: list[int] = []
    step = block_rows(family)
    for s, first_page in placed:
        for row in range(s.start, s.end, step):
            rows = min(step, s.end - row)
            shrinks += _rank_tiles(s, first_page, row, rows, block_rank)
            expands += (row, rows, first_page, len(s.pool_rows), 0, *_last_fields(s))
    return shrinks, expands


def slot_lists(placed: Sequence[Placed], blocks: int, block_rank: int) -> tuple[list[int], list[int]]:
    """Tiles of whole segments, cut by rank, and of each of `blocks` blocks of rows which tiles have rows there.

    A segment without rank lanes, whose rows have a vector, is a tile of no lanes.
    """
    tiles: list[int] = []
    found, step = [0] * (blocks * BLOCK_FIELDS), block_rows(Family.SLOTS)
    for s, first_page in placed:
        first, rows = len(tiles) // TILE_FIELDS, s.end - s.start
        tiles += _rank_tiles(s, first_page, s.start, rows, block_rank) or [
            *(s.start, rows, first_page, 0, 0),
            *_last_fields(s),
        ]
        for block in range(s.start // step, (s.end - 1) // step + 1):
            at = block * BLOCK_FIELDS
            found[at] = found[at] if found[at + 1] else first
            found[at + 1] = len(tiles) // TILE_FIELDS
    return tiles, found


def _rank_tiles(s: LowRankSegment, first_page: int, row: int, rows: int, block_rank: int) -> list[int]:
    rank, tiles = len(s.pool_rows), list[int]()
    for lane in range(0, rank, block_rank):
        tiles += (row, rows, first_page + lane // PAGE_ROWS, min(block_rank, rank - lane), lane, *_last_fields(s))
    return tiles


def _last_fields(s: LowRankSegment) -> tuple[int, int]:
    return int(s.activation), -1 if s.vector is None else s.vector
