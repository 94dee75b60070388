"""low_rank's compiled kernel on a CPU: what its own shape (items, tiles, sites in one call) could get wrong."""

import pytest
import torch

from chorus.kernels import Activation, Epilogue, LowRankPlan, LowRankSegment, RankPool, low_rank, low_rank_group
from chorus.kernels.native.low_rank import ROWS, TILE
from support.epilogue import defined
from support.low_rank import BOUND

CPU = torch.device("cpu")
BOUNDS = {torch.float32: 1e-5, torch.float16: BOUND[torch.float16][0], torch.bfloat16: 4e-3}
# (rows, rank): a row alone, odd ranks, more rows than an item has, and some that torch's GEMMs get
MIXED = [(1, 16), (2, 3), (ROWS + 3, 21), (1, 1), (70, 16), (5, 8)]


def batch_of(layout: list[tuple[int, int]], pool_rows: int) -> list[LowRankSegment]:
    """Segments with a free row before each; scattered pool rows."""
    order = torch.randperm(pool_rows, generator=torch.Generator().manual_seed(0)).tolist()
    segments, row, used = [], 0, 0
    for rows, rank in layout:
        segments.append(LowRankSegment(row + 1, row + 1 + rows, tuple(order[used : used + rank])))
        row, used = row + 1 + rows, used + rank
    return segments


def tensors(rows: int, k: int, n: int, dtype: torch.dtype, pool_rows: int = 96) -> tuple[torch.Tensor, ...]:
    """y, x, a, b, mid_scale."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    scale = random(pool_rows).abs() + 0.5
    return (
        random(rows, n).to(dtype),
        random(rows, k).to(dtype),
        *(random(pool_rows, w).to(dtype) for w in (k, n)),
        scale,
    )


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(("k", "n"), [(TILE + 37, 2 * TILE + 5), (17, TILE)])
@pytest.mark.parametrize("from_zero", [False, True])
def test_any_widths_ranks_and_rows_equal_the_definition(dtype: torch.dtype, k: int, n: int, from_zero: bool) -> None:
    segments = batch_of(MIXED, 96)
    y, x, a, b, scale = tensors(110, k, n, dtype)
    y, pool = y * (not from_zero), RankPool(a, b, scale / k**0.5)
    wide = torch.full((110, n + 3), torch.nan, dtype=dtype)
    wide[:, 3:] = y
    expected = defined(y, x, pool, segments, Epilogue())
    assert error(low_rank(wide[:, 3:], x, pool, LowRankPlan(segments, CPU)), expected) <= BOUNDS[dtype]
    assert wide[:, :3].isnan().all()


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_token_ids_pick_columns_of_a(dtype: torch.dtype) -> None:
    segments = batch_of(MIXED, 96)
    y, _, a, b, scale = tensors(110, 50, 24, dtype)
    pool, ids = RankPool(a, b, scale), torch.randint(50, (110,), generator=torch.Generator().manual_seed(0))
    expected = defined(y, torch.nn.functional.one_hot(ids, 50).to(dtype), pool, segments, Epilogue())
    assert error(low_rank(y, ids, pool, LowRankPlan(segments, CPU)), expected) <= BOUNDS[dtype]


def test_a_group_has_the_bits_of_its_members_one_by_one() -> None:
    segments = batch_of(MIXED, 96)
    plans = [LowRankPlan(segments, CPU), LowRankPlan(segments[1:3], CPU), LowRankPlan(segments[4:5], CPU)]
    widths, pools = (64, 2000, 40), []
    for n in widths:
        _, x, *pool = tensors(110, 96, n, torch.bfloat16)
        pools.append(RankPool(*pool))
    wide = torch.randn(110, sum(widths), generator=torch.Generator().manual_seed(2)).bfloat16()
    alone = [
        low_rank(y.clone(), x, pool, plan) for y, pool, plan in zip(wide.split(widths, 1), pools, plans, strict=True)
    ]
    low_rank_group(wide.split(widths, 1), x, pools, plans)
    assert torch.equal(wide, torch.cat(alone, 1))


def test_threads_change_no_bit() -> None:
    segments = batch_of(MIXED, 96)
    y, x, *pool = tensors(110, 300, 1500, torch.bfloat16)
    plan, threads, outputs = (
        LowRankPlan([s for s in segments if s.end - s.start < 64], CPU),
        torch.get_num_threads(),
        [],
    )
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outputs += [low_rank(y.clone(), x, RankPool(*pool), plan) for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("rows", [1, 20, 70])
def test_activation_and_bias_lie_between_the_products_of_short_and_long_segments(
    activation: Activation, rows: int
) -> None:
    segments = [LowRankSegment(1, 1 + rows, (3, 9, 4, 1, 77), activation)]
    y, x, a, b, scale = tensors(72, 40, 24, torch.float32)
    pool, epilogue = RankPool(a, b, scale / 40**0.5), Epilogue(mid_bias=a[:, 0].contiguous())
    expected = defined(y, x, pool, segments, epilogue)
    assert error(low_rank(y, x, pool, LowRankPlan(segments, CPU), epilogue), expected) <= BOUNDS[torch.float32]


@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_one_rows_nan_or_one_adapters_reaches_no_other_row(activation: Activation, dtype: torch.dtype) -> None:
    layout = [LowRankSegment(s.start, s.end, s.pool_rows, activation) for s in batch_of([(1, 8), (4, 7), (1, 4)], 96)]
    y, x, a, b, scale = tensors(10, 72, 64, dtype)
    clean = low_rank(y.clone(), x, RankPool(a, b, scale), LowRankPlan(layout, CPU))
    x[3] = torch.nan
    a[list(layout[2].pool_rows)] = b[list(layout[2].pool_rows)] = torch.inf
    got = low_rank(y.clone(), x, RankPool(a, b, scale), LowRankPlan(layout, CPU))
    assert got[3].isnan().all()
    assert not got[layout[2].start].isfinite().any()
    others = [row for row in range(10) if row not in (3, layout[2].start)]
    assert torch.equal(got[others], clean[others])


def test_what_would_be_read_or_written_amiss_is_refused_by_name() -> None:
    y, x, a, b, scale = tensors(4, 8, 6, torch.bfloat16)
    plan, pool = LowRankPlan([LowRankSegment(0, 2, (0, 1))], CPU), RankPool(a, b, scale)
    for ids in (torch.tensor([0, 1, 2, 8]), torch.tensor([0, -1, 2, 3])):
        with pytest.raises(ValueError, match="x: token ids must be 0 to 7"):
            low_rank(y, ids, pool, plan)
    with pytest.raises(ValueError, match="a: must be contiguous"):
        low_rank(y, x, pool._replace(a=torch.zeros(96, 16).bfloat16()[:, ::2]), plan)
    with pytest.raises(ValueError, match="mid_scale must be float32"):
        low_rank(y, x, pool._replace(mid_scale=scale.double()), plan)
    with pytest.raises(ValueError, match="ys: 0 and 1 share memory"):
        low_rank_group([y, y], x, [pool, pool], [plan, plan])


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(("k", "n", "rank"), [(2 * TILE, TILE + 64, 16), (TILE + 37, 100, 7), (48, TILE + 16, 8)])
def test_a_row_comes_out_alike_alone_and_among_others_of_its_adapter(
    dtype: torch.dtype, k: int, n: int, rank: int
) -> None:
    y, x, a, b, scale = tensors(ROWS + 3, k, n, dtype)
    pool, ranks = RankPool(a, b, scale / k**0.5), tuple(range(rank))
    together = low_rank(y.clone(), x, pool, LowRankPlan([LowRankSegment(0, len(x), ranks)], CPU))
    one_by_one = [LowRankSegment(i, i + 1, ranks) for i in range(len(x))]
    assert torch.equal(low_rank(y.clone(), x, pool, LowRankPlan(one_by_one, CPU)), together)
