"""An adapter pool's slots and rows."""

import pytest

from chorus.kernels import SlotSegment
from support.residency import SITES, lowered, make_pool


def test_slots_are_never_used_twice() -> None:
    pool = make_pool(rows=8)
    first = pool.load(lowered(8, 1.0))
    assert first is not None
    assert pool.load(lowered(8)) is None
    pool.evict(first)
    second = pool.load(lowered(8, 2.0))
    assert second is not None
    assert second != first
    with pytest.raises(KeyError):
        pool.plans([SlotSegment(0, 1, first)])


def test_mixed_ranks_take_their_rows_and_no_more() -> None:
    pool = make_pool(rows=256)
    for rank in (4, 8, 17, 128):
        assert pool.load(lowered(rank)) is not None
    assert pool.rows_used == 2 * (8 + 8 + 24 + 128)


def test_rows_that_are_no_neighbours_hold_an_adapters_factors() -> None:
    pool = make_pool(rows=24)
    first, _, third = (pool.load(lowered(8, fill)) for fill in (1.0, 2.0, 3.0))
    assert first is not None
    assert third is not None
    pool.evict(first)
    pool.evict(third)
    assert pool.load(lowered(12, 5.0)) is not None
    for name in SITES:
        a, b, scale = (getattr(pool.pools[name], which) for which in ("a", "b", "mid_scale"))
        assert a[:, 0].tolist() == [5.0] * 8 + [2.0] * 8 + [5.0] * 4 + [3.0] * 4
        assert b[:, 5].tolist() == a[:, 0].tolist()
        assert scale.tolist() == [0.5] * 24
