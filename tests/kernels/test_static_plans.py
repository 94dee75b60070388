"""Plans that are written anew: the same tables, in the same place, as a plan of the new batch would have."""

import pytest
import torch

from chorus.kernels import (
    Activation,
    AttentionCapacity,
    AttentionPlan,
    AttentionRow,
    LowRankCapacity,
    LowRankPlan,
    LowRankSegment,
    RankPool,
    StaticLowRank,
    decode_ranges,
    low_rank,
    low_rank_family,
    paged_attention,
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


class TestAttentionPlanOfACpu:
    """Of 256 pages, which are all that the cache has."""

    CAPACITY = AttentionCapacity.of_decodes(3, 8, BLOCK)

    def plan(self, *contexts: int) -> AttentionPlan:
        return AttentionPlan(decodes(*contexts), BLOCK, CPU, self.CAPACITY)

    def attended(self, plan: AttentionPlan, window: int | None = None) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        query = torch.randn(3, 4, 16, generator=generator)
        k_cache, v_cache = (torch.randn(self.CAPACITY.pages, 2, BLOCK, 16, generator=generator) for _ in range(2))
        return paged_attention(query, k_cache, v_cache, plan, scale=0.25, window=window)

    @pytest.mark.parametrize("contexts", [(1, 1, 1), (2500, 600, 5), (512, 513, 1024), (5, 4064, 16)])
    def test_attends_as_a_new_plan_does_from_the_old_place(self, contexts: tuple[int, int, int]) -> None:
        plan, fresh = self.plan(40, 700, 1), AttentionPlan(decodes(*contexts), BLOCK, CPU)
        before, slots, held = self.attended(plan), plan.slots, plan.on_cpu(0, None).decode_rows
        assert held is not None
        address = held.table.data_ptr()
        plan.rewrite(decodes(*contexts))
        for window in (None, 100):
            assert torch.equal(self.attended(plan, window), self.attended(fresh, window))
        assert not torch.equal(self.attended(plan), before)
        assert torch.equal(slots, fresh.slots)
        assert (plan.ends, plan.highest_block) == (fresh.ends, fresh.highest_block)
        assert plan.on_cpu(0, None).decode_rows is held
        assert held.table.data_ptr() == address

    def test_that_refused_a_batch_is_as_it_was(self) -> None:
        plan = self.plan(40, 700, 1)
        attended, slots, about = self.attended(plan), plan.slots.clone(), (plan.ends, plan.highest_block)
        for rows in (decodes(5, 4065, 16), decodes(1, 1), decodes(1, 1, 1, 1), []):
            with pytest.raises(ValueError, match="rows:"):
                plan.rewrite(rows)
        assert torch.equal(self.attended(plan), attended)
        assert torch.equal(plan.slots, slots)
        assert (plan.ends, plan.highest_block) == about
        assert plan.rows == tuple(decodes(40, 700, 1))


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


class TestStaticLowRankOfACpu:
    CAPACITY, ONE, OTHER = TestStaticTables.CAPACITY, TestStaticTables.ONE, TestStaticTables.OTHER
    FEWER = (LowRankSegment(3, 4, (5,)),)

    def added(self, plan: LowRankPlan) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        y, x, a, b = (torch.randn(rows, n, generator=generator) for rows, n in ((4, 24), (4, 40), (48, 40), (48, 24)))
        return low_rank(y, x, RankPool(a, b, torch.rand(48, generator=generator)), plan)

    def test_gives_each_site_its_batch(self) -> None:
        static = StaticLowRank(4, self.CAPACITY, CPU)
        nothing = self.added(LowRankPlan((), CPU))
        assert all(torch.equal(self.added(plan), nothing) for plan in static.plans)
        batches: list[tuple[LowRankSegment, ...]] = [(), self.ONE, self.OTHER]
        steps: list[tuple[list[tuple[LowRankSegment, ...]], list[int]]] = [
            (batches, [0, 1, 2, 1]),
            (batches, [1, 2, 1, 0]),
            ([self.FEWER], [0] * 4),
            ([()], [0] * 4),
        ]
        for made, batch_of in steps:
            static.rewrite(made, batch_of)
            for plan, which in zip(static.plans, batch_of, strict=True):
                assert torch.equal(self.added(plan), self.added(LowRankPlan(made[which], CPU)))

    def test_refuses_fewer_rows_than_a_batch_may_have(self) -> None:
        pool = RankPool(torch.zeros(48, 40), torch.zeros(48, 24), torch.zeros(48))
        with pytest.raises(ValueError, match="plan: made for at least 4 rows, x has 3"):
            low_rank(torch.zeros(3, 24), torch.zeros(3, 40), pool, StaticLowRank(1, self.CAPACITY, CPU).plans[0])

    def test_may_be_of_no_sites(self) -> None:
        for triton in (False, True):
            static = StaticLowRank(0, self.CAPACITY, CPU, triton=triton)
            static.rewrite([(), self.ONE], [])
            assert static.plans == []

    def test_holds_a_segment_for_each_row_of_the_largest_rank(self) -> None:
        static, full = StaticLowRank(1, self.CAPACITY, CPU), [range(16 * i, 16 * i + 16) for i in range(3)]
        segments = [LowRankSegment(i, i + 1, tuple(rows)) for i, rows in enumerate([*full, full[0]])]
        static.rewrite([segments], [0])
        assert torch.equal(self.added(static.plans[0]), self.added(LowRankPlan(segments, CPU)))

    @pytest.mark.parametrize(
        "over",
        [
            LowRankSegment(0, 1, tuple(range(17))),
            LowRankSegment(4, 5, (0,)),
            LowRankSegment(0, 1, (0,), Activation.RELU),
        ],
        ids=["rank", "rows", "activation"],
    )
    def test_refuses_what_is_over_the_capacity_and_writes_nothing(self, over: LowRankSegment) -> None:
        static = StaticLowRank(2, self.CAPACITY, CPU)
        static.rewrite([self.ONE, self.OTHER], [0, 1])
        before = [self.added(plan) for plan in static.plans]
        with pytest.raises(ValueError, match=r"segments: .*apacity"):
            static.rewrite([self.FEWER, (over,)], [0, 1])
        assert all(torch.equal(self.added(plan), old) for plan, old in zip(static.plans, before, strict=True))
