"""Plans that are written anew: the same tables, in the same place, as a plan of the new batch would have."""

import pytest
import torch

from chorus.kernels import (
    AttentionCapacity,
    AttentionPlan,
    AttentionRow,
    LowRankCapacity,
    LowRankSegment,
    decode_ranges,
    low_rank_family,
)
from chorus.kernels.low_rank_tables import LowRankTables, StaticTables

CPU = torch.device("cpu")
BLOCK = 16


def decodes(*contexts: int) -> list[AttentionRow]:
    """A row for each, in pages of its own."""
    pages = [-(-context // BLOCK) for context in contexts]
    first = [sum(pages[:i]) for i in range(len(pages))]
    return [
        AttentionRow(i, i + 1, context, tuple(range(at, at + count)))
        for i, (context, at, count) in enumerate(zip(contexts, first, pages, strict=True))
    ]


class TestAttentionPlan:
    CAPACITY = AttentionCapacity.of_decodes(3, 8, BLOCK)

    def plan(self, *contexts: int) -> AttentionPlan:
        return AttentionPlan(decodes(*contexts), BLOCK, CPU, self.CAPACITY, triton=True)

    @pytest.mark.parametrize("contexts", [(1, 1, 1), (2500, 600, 5), (512, 513, 1024)])
    def test_has_the_new_batchs_tables_in_the_old_place(self, contexts: tuple[int, int, int]) -> None:
        plan, fresh = self.plan(40, 700, 1), self.plan(*contexts)
        tables = [plan.tables(4, window) for window in (None, 100)]
        slots = plan.slots
        plan.rewrite(decodes(*contexts))
        assert torch.equal(slots, fresh.slots)
        for (table, geometry), window in zip(tables, (None, 100), strict=True):
            assert torch.equal(table, fresh.tables(4, window).tables)
            assert geometry == fresh.tables(4, window).geometry
        assert plan.highest_block == fresh.highest_block

    def test_holds_any_decodes_of_so_many_ranges_and_no_more(self) -> None:
        plan = self.plan(1, 1, 1)
        plan.tables(4, None)
        for contexts in ((3072, 512, 512), (1, 3072, 1), (1025, 1025, 1024)):
            assert sum(map(decode_ranges, contexts)) <= 8
            plan.rewrite(decodes(*contexts))
        with pytest.raises(ValueError, match="need 9 decode_items, the capacity is 8"):
            plan.rewrite(decodes(3073, 512, 512))

    def test_that_refused_a_batch_is_as_it_was(self) -> None:
        plan = self.plan(40, 700, 1)
        before = plan.tables(4, None).tables.clone(), plan.slots.clone()
        for rows in (decodes(4000, 4000, 4000), decodes(1, 1)):
            with pytest.raises(ValueError, match="rows:"):
                plan.rewrite(rows)
        assert torch.equal(plan.tables(4, None).tables, before[0])
        assert torch.equal(plan.slots, before[1])
        assert plan.rows == tuple(decodes(40, 700, 1))

    def test_without_a_capacity_is_not_written(self) -> None:
        with pytest.raises(ValueError, match="capacity:"):
            AttentionPlan(decodes(1), BLOCK, CPU, triton=True).rewrite(decodes(2))


class TestStaticTables:
    CAPACITY = LowRankCapacity(4, 16, low_rank_family(4, 1))
    ONE = (LowRankSegment(0, 1, tuple(range(8))), LowRankSegment(2, 3, tuple(range(16, 32))))
    OTHER = (LowRankSegment(1, 4, tuple(range(40, 48))),)

    def test_give_each_site_its_batch(self) -> None:
        static = StaticTables(4, self.CAPACITY, CPU)
        addresses = [tables.buffer.data_ptr() for tables in static.tables]
        assert all(address % 16 == 0 for address in addresses)
        for batch_of in ([0, 1, 2, 1], [2, 0, 0, 1]):
            batches = [(), self.ONE, self.OTHER]
            static.rewrite(batches, batch_of)
            for tables, which in zip(static.tables, batch_of, strict=True):
                alone = LowRankTables(batches[which], CPU, self.CAPACITY)
                assert torch.equal(tables.buffer[: alone.buffer.numel()], alone.buffer)
                assert tables.flat_geometry == alone.flat_geometry
        assert [tables.buffer.data_ptr() for tables in static.tables] == addresses

    def test_refuse_what_is_over_the_capacity_and_write_nothing(self) -> None:
        static = StaticTables(2, self.CAPACITY, CPU)
        static.rewrite([self.ONE], [0, 0])
        before = [tables.buffer.clone() for tables in static.tables]
        with pytest.raises(ValueError, match="exceed"):
            static.rewrite([self.OTHER, (LowRankSegment(0, 1, tuple(range(24))),)], [0, 1])
        assert all(torch.equal(tables.buffer, old) for tables, old in zip(static.tables, before, strict=True))
