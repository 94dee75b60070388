"""Plans with a capacity, at the largest batch that it holds and one over; and what is launched for any batch in it.

A CUDA graph repeats grids, numbers and addresses as they were at its capture, so all of them have to depend on the
capacity alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch

from chorus.kernels import (
    AttentionPlan,
    HeadPlan,
    LowRankPlan,
    LowRankSegment,
    PackedPlan,
    RopePlan,
    RowPlan,
    head,
    low_rank_group,
    packed_attention,
    paged_attention,
    qk_norm_rope_store,
    reference,
    residual_norm,
    row_scale,
)
from chorus.kernels import attention_tables as attention
from chorus.kernels.head_tables import HeadCapacity
from chorus.kernels.low_rank_tables import Capacity
from chorus.kernels.tuning import Family
from support import heads, rows
from support.attention import BLOCK, batch, check
from support.launches import noted_launches
from support.low_rank import BOUND, batch_of, dense, make_pool
from support.pointwise import make_norm
from support.rope_store import angles
from support.rows import noise

CPU = torch.device("cpu")
Step = Callable[[], object]


class Group:
    """Three sites that read one x of 5 rows, their segments of different ranks at each, up to 24, 40 and 8."""

    ROWS, K, WIDTHS, RANKS = 5, 48, (32, 16, 48), (24, 40, 8)

    def __init__(self, family: Family, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        pages = [self.ROWS * rank // 8 for rank in self.RANKS]
        # One site's pool has as many rows as another's, whatever its ranks.
        self.pools = [make_pool(self.K, n, dtype, generator, max(pages)) for n in self.WIDTHS]
        self.plans = [
            LowRankPlan([], CPU, triton=True, capacity=Capacity(self.ROWS, rank, family)) for rank in self.RANKS
        ]
        self.x = torch.randn(self.ROWS, self.K, generator=generator).to(dtype)
        self.y = torch.randn(self.ROWS, sum(self.WIDTHS), generator=generator).to(dtype)
        self.out = self.y.clone()

    @classmethod
    def largest(cls) -> list[list[LowRankSegment]]:
        """At each site every row another adapter's, each of the largest rank."""
        return [batch_of([(1, rank)] * cls.ROWS, scatter=rank) for rank in cls.RANKS]

    def run(self, batches: Sequence[Sequence[LowRankSegment]]) -> None:
        for plan, segments in zip(self.plans, batches, strict=True):
            plan.rewrite(segments)
        self.out.copy_(self.y)
        low_rank_group(self.out.split(self.WIDTHS, dim=1), self.x, self.pools, self.plans)

    def check(self, batches: Sequence[list[LowRankSegment]], dtype: torch.dtype) -> None:
        self.run(batches)
        sites = zip(self.y.split(self.WIDTHS, 1), self.out.split(self.WIDTHS, 1), self.pools, batches, strict=True)
        for y, got, pool, segments in sites:
            expected = dense(y, self.x, pool, segments)
            error = float((got.double() - expected).square().mean().sqrt())
            assert error <= BOUND[dtype][0] * float(expected.square().mean().sqrt())


@pytest.mark.parametrize("family", Family)
def test_the_largest_batch_of_a_group(family: Family) -> None:
    """All rows of all three sites; and nothing of it is left in the tables for a smaller one."""
    group = Group(family, torch.bfloat16)
    smaller = [batch_of([(3, 8), (1, 0), (1, 24)]), [], batch_of([(5, 3)])]
    for batches in (group.largest(), smaller):
        group.check(batches, torch.bfloat16)


@pytest.mark.parametrize(
    ("site", "over", "says"),
    [
        (0, [(1, 24)] * 6, "segments: 6 rows of rank 24 exceed Capacity"),
        (1, [(1, 40)] * 4 + [(1, 41)], "segments: 5 rows of rank 41 exceed Capacity"),
        (2, [(6, 8)], "segments: 6 rows of rank 8 exceed Capacity"),
    ],
)
def test_a_site_refuses_what_is_one_over_and_keeps_its_batch(site: int, over: list[tuple[int, int]], says: str) -> None:
    plan, full = Group(Family.ROWS, torch.bfloat16).plans[site], Group.largest()[site]
    plan.rewrite(full)
    assert plan.tables is not None
    before = plan.tables.buffer.clone()
    with pytest.raises(ValueError, match=says):
        plan.rewrite(batch_of(over))
    assert torch.equal(plan.tables.buffer, before)
    assert list(plan.segments) == full


def test_segments_out_of_order_leave_the_tables_as_they_were() -> None:
    plan = LowRankPlan([], CPU, triton=True, capacity=Capacity(4, 8, Family.ROWS))
    assert plan.tables is not None
    before = plan.tables.buffer.clone()
    with pytest.raises(ValueError, match=r"segments: .0, 3. overlaps"):
        plan.rewrite([LowRankSegment(0, 3, (0,)), LowRankSegment(0, 3, (8,)), LowRankSegment(3, 4, (16,))])
    assert torch.equal(plan.tables.buffer, before)


# What 3 decodes over up to 1100 tokens, and 2 chunks that fill 4 tiles of 16 tokens, need at most.
FULL = [(1, 1099), (1, 1099), (1, 1099), (32, 0), (32, 32)]
CAPACITY = attention.Capacity(decode_items=9, prefill_items=4, merges=3, parts=9, pages=213)
OVER = {
    "decode_items": [(1, 0)] * 10,
    "prefill_items": [(2, 0)] * 5,
    "merges": [(1, 512)] * 4,
    "parts": [(1, 1535), (1, 1535), (1, 1536)],
    "pages": [(1, 511)] * 6 + [(1, 351)],
}


def test_the_largest_batch_of_attention() -> None:
    """To the last entry of every table: nothing is left over, and nothing left out."""
    query, k_cache, v_cache, attended = batch(FULL, (4, 1), 16, torch.float32, 0)
    plan = AttentionPlan(attended, BLOCK, CPU, CAPACITY, triton=True)
    assert plan.tables(4, None).geometry == AttentionPlan(attended, BLOCK, CPU, triton=True).tables(4, None).geometry
    got = paged_attention(query, k_cache, v_cache, plan, scale=0.25)
    exact = reference.paged_attention(query.double(), k_cache.double(), v_cache.double(), attended, scale=0.25)
    check(got, exact, torch.float32)


@pytest.mark.parametrize(("field", "lengths"), OVER.items(), ids=OVER)
def test_attention_refuses_what_is_one_over(field: str, lengths: list[tuple[int, int]]) -> None:
    """In the one table, while the others have room."""
    most = getattr(CAPACITY, field)
    roomy = attention.Capacity(*[999] * 5)
    query, k_cache, v_cache, attended = batch(lengths, (4, 1), 16, torch.float32, 0)
    plan = AttentionPlan(attended, BLOCK, CPU, replace(roomy, **{field: most}), triton=True)
    with noted_launches() as launches:
        with pytest.raises(ValueError, match=f"rows: need {most + 1} {field}, the capacity is {most}"):
            paged_attention(query, k_cache, v_cache, plan, scale=0.25)
        assert not launches
        plan = AttentionPlan(attended, BLOCK, CPU, replace(roomy, **{field: most + 1}), triton=True)
        paged_attention(query, k_cache, v_cache, plan, scale=0.25)
        assert launches


def test_the_largest_pack_and_one_over() -> None:
    """With 4 heads to a key head a tile is 16 tokens: 2 sequences of one token, pieces of 33 and of 16."""
    query, key, value = (noise(i, 51, h, 16) for i, h in enumerate((4, 1, 1)))
    capacity = attention.Capacity(decode_items=2, prefill_items=4, merges=0, parts=0, pages=51)
    lengths = [1, 33, 16, 1]
    got = packed_attention(query, key, value, PackedPlan(lengths, CPU, capacity, triton=True), scale=0.25)
    exact = reference.packed_attention(query.double(), key.double(), value.double(), lengths, scale=0.25)
    check(got, exact, torch.float32)
    for over, field in (([1, 48, 1, 1], "decode_items"), ([1, 33, 17], "prefill_items"), ([48, 4], "pages")):
        q, k, v = (noise(i, sum(over), h, 16) for i, h in enumerate((4, 1, 1)))
        with pytest.raises(ValueError, match=f"need .* {field}, the capacity"):
            packed_attention(q, k, v, PackedPlan(over, CPU, capacity, triton=True), scale=0.25)


def test_rotation_reads_what_its_tensors_hold_by_then() -> None:
    """A plan of as many rows as its tensors; another number of rows is refused."""
    (cos, sin), slots = (t.float() for t in angles(4, 16, 0)), torch.zeros(4, dtype=torch.int64)
    plan, qkv = RopePlan(cos, sin, slots, triton=True), noise(0, 4, 4, 16)
    for seed, given_ in enumerate(([9, 0, 5, 14], [1, 3, 11, 2])):
        slots.copy_(torch.tensor(given_))
        cos.copy_(angles(4, 16, seed)[0])
        sin.copy_(angles(4, 16, seed)[1])
        caches, exact = torch.ones(2, 4, 1, 4, 16), torch.ones(2, 4, 1, 4, 16).double()
        query = qk_norm_rope_store(qkv, caches[0], caches[1], plan)
        spec = reference.qk_norm_rope_store(qkv.double(), exact[0], exact[1], cos.double(), sin.double(), slots)
        check(query, spec, torch.float32)
        check(caches, exact, torch.float32)
    for rows_ in (3, 5):
        with pytest.raises(ValueError, match=f"plan: 4 rows on cpu, qkv has {rows_}"):
            qk_norm_rope_store(noise(0, rows_, 4, 16), caches[0], caches[1], plan)


def test_rows_and_heads_refuse_one_over_and_keep_their_batch() -> None:
    of_rows = RowPlan([], 0, CPU, triton=True, capacity=7)
    of_heads = HeadPlan([], 0, CPU, triton=True, capacity=HeadCapacity(5, 9))
    of_rows.rewrite(*rows.segments_of([(7, 3)]))
    of_heads.rewrite(*heads.segments_of([(1, 9, True), (4, 9, False)]))
    assert of_rows.buffer is not None
    assert of_heads.tables is not None
    before = [t.clone() for t in (of_rows.buffer, of_heads.tables.buffer)]
    with pytest.raises(ValueError, match="rows: 8, the capacity is 7"):
        of_rows.rewrite(*rows.segments_of([(8, 1)]))
    for layout in ([(6, 9, False)], [(5, 10, True)]):
        with pytest.raises(ValueError, match=r"segments: . rows of up to .* labels exceed"):
            of_heads.rewrite(*heads.segments_of(layout))
    assert torch.equal(of_rows.buffer, before[0])
    assert torch.equal(of_heads.tables.buffer, before[1])
    assert (of_rows.rows, of_rows.slots_needed, of_heads.rows) == (7, 4, 5)


def low_rank_steps(family: Family = Family.ROWS) -> list[Step]:
    group = Group(family, torch.bfloat16)
    batches: list[list[list[LowRankSegment]]] = [
        group.largest(),
        [batch_of([(5, 5)]), batch_of([(1, 8), (3, 0), (1, 40)]), []],
        [[], [], []],
    ]
    return [partial(group.run, batch) for batch in batches]


def slot_steps() -> list[Step]:
    return low_rank_steps(Family.SLOTS)


def row_steps() -> list[Step]:
    plan, norm = RowPlan([], 0, CPU, triton=True, capacity=7), make_norm("layer", 33, torch.float32, 0, pooled=True)
    y, vectors = noise(0, 7, 33), noise(1, 6, 33)

    def step(layout: rows.Layout) -> None:
        plan.rewrite(*rows.segments_of(layout))
        row_scale(y, vectors, plan)
        residual_norm(y, None, norm, plan)

    layouts: list[rows.Layout] = [[(1, i % 6) for i in range(7)], [(2, None), (1, 5)], [(1, None)]]
    return [partial(step, layout) for layout in layouts]


def head_steps() -> list[Step]:
    plan = HeadPlan([], 0, CPU, triton=True, capacity=HeadCapacity(5, 9))
    layouts: list[heads.Layout] = [[(1, 9, i % 2 == 0) for i in range(5)], [(2, 3, False)], [(1, 0, False)]]
    pool, x = heads.make_pool(layouts[0], 16, torch.float32, 0), noise(0, 5, 16)

    def step(layout: heads.Layout) -> None:
        plan.rewrite(*heads.segments_of(layout))
        head(x, pool, plan)

    return [partial(step, layout) for layout in layouts]


def attention_steps() -> list[Step]:
    """All of a layer's: rotation and storing too. Batches of as many tokens."""
    (cos, sin), qkv = (t.float() for t in angles(67, 16, 0)), noise(0, 67, 6, 16)
    k_cache, v_cache = torch.zeros(2, 220, 1, BLOCK, 16)

    def step(lengths: list[tuple[int, int]]) -> None:
        attended = batch(lengths, (4, 1), 16, torch.float32, 1)[3]
        plan = AttentionPlan(attended, BLOCK, CPU, replace(CAPACITY, decode_items=67, prefill_items=5), triton=True)
        query = qk_norm_rope_store(qkv, k_cache, v_cache, RopePlan(cos, sin, plan.slots, triton=True))
        for window in (None, 40):
            paged_attention(query, k_cache, v_cache, plan, scale=0.25, window=window)

    return [partial(step, lengths) for lengths in (FULL, [(1, 0)] * 67, [(66, 2), (1, 600)])]


def packed_steps() -> list[Step]:
    capacity = attention.Capacity(decode_items=51, prefill_items=26, merges=0, parts=0, pages=51)
    query, key, value = (noise(i, 51, h, 16) for i, h in enumerate((4, 1, 1)))

    def step(lengths: list[int]) -> None:
        packed_attention(query, key, value, PackedPlan(lengths, CPU, capacity, triton=True), scale=0.25)

    return [partial(step, lengths) for lengths in ([1] * 51, [51], [17, 1, 33])]


@pytest.mark.parametrize("steps", [low_rank_steps, slot_steps, row_steps, head_steps, attention_steps, packed_steps])
def test_what_is_launched_depends_on_the_capacity_alone(steps: Callable[[], list[Step]]) -> None:
    noted = []
    for step in steps():
        with noted_launches() as launches:
            step()
        noted.append(launches)
    assert noted[0]
    assert noted[0] == noted[1] == noted[2]
