"""low_rank on a CUDA device, alone, grouped, with an epilogue, against float64 math; and replayed in a CUDA graph."""

import pytest
import torch

from chorus.kernels import Activation, Epilogue, LowRankPlan, LowRankSegment, RankPool, low_rank, low_rank_group
from chorus.kernels.low_rank_tables import Capacity
from chorus.kernels.tuning import Family
from support.epilogue import MIXED, defined, make_epilogue, segments_of
from support.low_rank import BOUND, LAYOUTS, batch_of, check, dense, make_pool

CUDA = torch.device("cuda")

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("k", "n"), [(4096, 1024), (1024, 14336), (33, 65)])
@pytest.mark.parametrize("from_zero", [False, True])
def test_low_rank_equals_dense_float64_math(
    layout: list[tuple[int, int]], dtype: torch.dtype, k: int, n: int, from_zero: bool
) -> None:
    total = sum(rows for rows, _ in layout) + 1
    check(batch_of(layout, scatter=3), total, k, n, dtype, from_zero=from_zero, device=CUDA)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("k", "n"), [(4096, 1024), (33, 65)])
def test_all_slots_equal_dense_float64_math(layout: list[tuple[int, int]], dtype: torch.dtype, k: int, n: int) -> None:
    segments, total = batch_of(layout, scatter=3), sum(rows for rows, _ in layout) + 1
    capacity = Capacity(total, max(rank for _, rank in layout), Family.SLOTS)
    plan = LowRankPlan([], CUDA, capacity=capacity)
    plan.rewrite(segments)
    check(segments, total, k, n, dtype, plan=plan, device=CUDA)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_in_all_slots_a_rows_bits_do_not_depend_on_who_else_is_in_the_batch(dtype: torch.dtype) -> None:
    segments = batch_of([(2, 16), (5, 8), (1, 16), (9, 24), (3, 16), (12, 8)], scatter=2)
    generator = torch.Generator().manual_seed(0)
    pool = RankPool(*(t.cuda() for t in make_pool(4096, 1024, dtype, generator, pages=11)))
    x, y = (torch.randn(32, width, generator=generator).to(dtype).cuda() for width in (4096, 1024))
    plan = LowRankPlan([], CUDA, capacity=Capacity(32, 24, Family.SLOTS))
    plan.rewrite(segments)
    together = low_rank(y.clone(), x, pool, plan)
    for s in segments:
        own = slice(s.start, s.end)
        plan.rewrite([LowRankSegment(0, s.end - s.start, s.pool_rows)])
        assert torch.equal(together[own], low_rank(y[own].clone(), x[own].clone(), pool, plan))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_members_of_a_group_add_to_their_columns_alone(layout: list[tuple[int, int]], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    segments, widths = batch_of(layout), [1024, 256, 272]
    total, pages = sum(rows for rows, _ in layout) + 1, sum(-(-rank // 8) for _, rank in layout)
    pools = [make_pool(1024, n, dtype, generator, pages=pages) for n in widths]
    x, wide = (torch.randn(total, n, generator=generator).to(dtype) for n in (1024, sum(widths)))
    expected = [dense(y, x, pool, segments) for y, pool in zip(wide.split(widths, dim=1), pools, strict=True)]
    ys = wide.cuda().split(widths, dim=1)
    plan = LowRankPlan(segments, CUDA)
    low_rank_group(ys, x.cuda(), [RankPool(*(tensor.cuda() for tensor in pool)) for pool in pools], [plan] * 3)
    for got, wanted in zip(ys, expected, strict=True):
        error = (got.cpu().double() - wanted).pow(2).mean().sqrt()
        assert float(error) <= BOUND[dtype][0] * float(wanted.pow(2).mean().sqrt())


@pytest.mark.parametrize("layout", [MIXED, [row for row in MIXED if row[0] == 1][:3]], ids=["mixed", "a few rows"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_epilogue_equals_the_definition(
    layout: list[tuple[int, int, Activation, int | None]], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    pool = make_pool(256, 512, dtype, generator, pages=16)
    x = (torch.randn(53, 256, generator=generator) / 16).to(dtype)
    y = torch.randn(53, 512, generator=generator).to(dtype)
    segments, epilogue = segments_of(layout), make_epilogue(128, 512, dtype, generator)
    there, around = RankPool(*(t.cuda() for t in pool)), Epilogue(*(t.cuda() for t in epilogue if t is not None))
    got = low_rank(y.cuda(), x.cuda(), there, LowRankPlan(segments, CUDA), around).cpu()
    expected = defined(y, x, pool, segments, epilogue)
    error = (got.double() - expected).pow(2).mean().sqrt()
    assert float(error) <= BOUND[dtype][0] * float(expected.pow(2).mean().sqrt())


@pytest.mark.parametrize("family", Family)
def test_a_graph_replays_other_batches_of_its_capacity(family: Family) -> None:
    """Captured over an empty batch; each replay adds what the tables hold by then."""
    rows, rank, k, n = 12, 64, 1024, 512
    batches = [batch_of([(1, rank)] * rows), batch_of([(3, 8), (2, 0), (7, 24)]), [], batch_of([(rows, 16)])]
    generator = torch.Generator().manual_seed(0)
    pool = make_pool(k, n, torch.bfloat16, generator, pages=rows * rank // 8)
    x, y = (torch.randn(rows, width, generator=generator).bfloat16() for width in (k, n))
    there, there_x, there_y = RankPool(*(tensor.cuda() for tensor in pool)), x.cuda(), y.cuda()
    plan = LowRankPlan([], CUDA, capacity=Capacity(rows, rank, family))
    low_rank(there_y, there_x, there, plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        low_rank(there_y, there_x, there, plan)
    for segments in batches:
        there_y.copy_(y)
        plan.rewrite(segments)
        graph.replay()
        expected = dense(y, x, pool, segments)
        error = (there_y.cpu().double() - expected).pow(2).mean().sqrt()
        assert float(error) <= BOUND[torch.bfloat16][0] * float(expected.pow(2).mean().sqrt())
