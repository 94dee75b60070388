"""Which family a static plan has, and the lists of SLOTS: what a program finds there, and that it finds no more."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.kernels import LowRankSegment, low_rank_family
from chorus.kernels.low_rank_choice import CAPACITY_RULES
from chorus.kernels.low_rank_lists import BLOCK_FIELDS, TILE_FIELDS, slot_lists
from chorus.kernels.tuning import Family

BLOCK = 16


@pytest.mark.parametrize(
    ("rows", "longest", "family"),
    [
        (1, 1, Family.ROWS),
        (512, 2, Family.ROWS),
        (64, 4, Family.SMALL),
        (64, 33, Family.SLOTS),
        (120, 32, Family.SMALL),
        (128, 3, Family.SLOTS),
        (512, 512, Family.SLOTS),
    ],
)
def test_a_static_plan_has_the_family_of_its_shape(rows: int, longest: int, family: Family) -> None:
    assert low_rank_family(rows, longest) is family


def test_every_rule_is_met_by_some_shape() -> None:
    met = set()
    for rows in range(1, 513):
        for longest in range(1, rows + 1):
            met.add(next(r for r in CAPACITY_RULES if rows >= r.rows_from and longest <= (r.longest_up_to or longest)))
    assert met == set(CAPACITY_RULES)


@st.composite
def batches(draw: st.DrawFn) -> list[tuple[LowRankSegment, int]]:
    """Segments with gaps between, and where their pages begin in the table."""
    placed: list[tuple[LowRankSegment, int]] = []
    row = pages = 0
    for _ in range(draw(st.integers(0, 12))):
        row += draw(st.sampled_from([0, 0, 1, 20]))
        rows, rank = draw(st.integers(1, 40)), draw(st.sampled_from([0, 5, 8, 16, 24, 40]))
        vector = draw(st.none() | st.integers(0, 3)) if rank else 1
        placed.append(
            (LowRankSegment(row, row + rows, tuple(range(8 * pages, 8 * pages + rank)), vector=vector), pages)
        )
        row, pages = row + rows, pages + -(-rank // 8)
    return placed


@given(batches())
def test_a_block_has_the_tiles_of_its_rows_and_no_others(placed: list[tuple[LowRankSegment, int]]) -> None:
    end = max((s.end for s, _ in placed), default=0)
    count = -(-end // BLOCK) + 1
    tiles, blocks = slot_lists(placed, count, 16)
    fields = [tuple(tiles[i : i + TILE_FIELDS]) for i in range(0, len(tiles), TILE_FIELDS)]
    for block in range(count):
        first, last = blocks[block * BLOCK_FIELDS : (block + 1) * BLOCK_FIELDS]
        rows = range(block * BLOCK, (block + 1) * BLOCK)
        wanted = [
            (
                s.start,
                s.end - s.start,
                page + lane // 8,
                min(16, len(s.pool_rows) - lane),
                lane,
                0,
                -1 if s.vector is None else s.vector,
            )
            for s, page in placed
            if s.start < rows.stop and s.end > rows.start
            for lane in range(0, max(len(s.pool_rows), 1), 16)
        ]
        assert fields[first:last] == wanted
