"""low_rank on Triton, in the interpreter, against dense float64 math from the definition."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chorus.kernels import LowRankPlan, LowRankSegment, low_rank, low_rank_group
from chorus.kernels.low_rank_tables import Capacity
from chorus.kernels.tuning import Family
from support.low_rank import LAYOUTS, batch_of, check, dense, make_pool

CPU = torch.device("cpu")


@st.composite
def layouts(draw: st.DrawFn) -> list[tuple[int, int]]:
    ranks = st.one_of(st.sampled_from([0, 8, 16, 24, 64]), st.integers(1, 40))
    lengths = st.one_of(st.just(1), st.integers(0, 5), st.sampled_from([16, 33, 70]))
    return draw(st.lists(st.tuples(lengths, ranks), max_size=4))


@settings(max_examples=30, deadline=None)
@given(
    layout=layouts(), k=st.sampled_from([1, 16, 33, 80]), n=st.sampled_from([1, 16, 65]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), seed=st.integers(0, 99),
    from_zero=st.booleans(), first_row=st.integers(0, 2), scatter=st.one_of(st.none(), st.integers(0, 9)),
)  # fmt: skip
def test_low_rank_equals_dense_float64_math(
    layout: list[tuple[int, int]], k: int, n: int, dtype: torch.dtype, seed: int, from_zero: bool, first_row: int,
    scatter: int | None,
) -> None:  # fmt: skip
    segments = batch_of(layout, first_row=first_row, scatter=scatter)
    total = first_row + sum(rows for rows, _ in layout) + 1
    if dtype is not torch.float32 and min(k, n) < 16:
        k, n = 33, 65  # an RMS of a few roundings means nothing
    check(segments, total, k, n, dtype, seed=seed, from_zero=from_zero)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "from_zero"),
    [(torch.float32, True), (torch.float16, True), (torch.bfloat16, True), (torch.bfloat16, False)],
)
def test_layouts_of_real_batches(layout: list[tuple[int, int]], dtype: torch.dtype, from_zero: bool) -> None:
    """K of 272 leaves splits without work, N of 144 a last tile in part."""
    check(batch_of(layout), sum(rows for rows, _ in layout), 272, 144, dtype, from_zero=from_zero)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [1200, 4112])
def test_splits_of_several_blocks_of_k(dtype: torch.dtype, k: int) -> None:
    check(batch_of([(1, 16), (3, 8)]), 4, k, 16, dtype)


def test_plans_of_one_upload_are_as_plans_alone() -> None:
    batches = [batch_of([(1, 8), (3, 24)]), [], batch_of([(20, 40)], scatter=1), batch_of([(1, 16)] * 7)]
    plans = LowRankPlan.together(batches, CPU, triton=True)
    for segments, plan in zip(batches, plans, strict=True):
        assert plan.tables is not None
        assert plan.tables.buffer.data_ptr() % 16 == 0
        check(segments, 24, 48, 33, torch.float32, plan=plan)
    assert len({plan.tables.buffer.untyped_storage().data_ptr() for plan in plans if plan.tables}) == 1


@pytest.mark.parametrize("family", Family)
def test_the_largest_batch_of_a_capacity(family: Family) -> None:
    """Every row another adapter's, each of the largest rank: nothing is left out, whatever the tables held before."""
    rows, rank = 9, 24
    capacity = Capacity(rows, rank, family)
    full = batch_of([(1, rank)] * rows)
    plan = LowRankPlan([], CPU, triton=True, capacity=capacity)
    assert plan.tables is not None
    buffer = plan.tables.buffer
    for segments in (full, batch_of([(3, 8), (2, 0), (4, 24)]), [], full):
        plan.rewrite(segments)
        assert plan.tables.buffer is buffer
        check(segments, rows, 48, 33, torch.float32, plan=plan)


def test_few_rows_are_one_launch_and_more_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    from chorus.kernels import low_rank_launch

    launched: list[str] = []

    def noted(name: str, plain: Callable[..., None]) -> Callable[..., None]:
        def launch(*given: object) -> None:
            launched.append(name)
            plain(*given)

        return launch

    for name in ("_fused", "_shrink", "_expand"):
        monkeypatch.setattr(low_rank_launch, name, noted(name, getattr(low_rank_launch, name)))
    check(batch_of([(1, 8), (2, 24)]), 3, 64, 48, torch.bfloat16)
    assert launched == ["_fused"] * 2
    launched.clear()
    check(batch_of([(1, 8)] * 5), 5, 64, 48, torch.bfloat16)
    assert launched == ["_shrink", "_expand"] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_members_of_a_group_of_few_rows_are_one_launch(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    segments = batch_of([(1, 8), (1, 0), (2, 40)])
    plans = [LowRankPlan(segments, CPU, triton=True), LowRankPlan(segments[1:], CPU, triton=True)]
    pools = [make_pool(64, n, dtype, generator, pages=8) for n in (48, 96)]
    x, wide = (torch.randn(4, width, generator=generator).to(dtype) for width in (64, 144))
    ys = wide.split([48, 96], dim=1)
    expected = [dense(y, x, pool, list(plan.segments)) for y, pool, plan in zip(ys, pools, plans, strict=True)]
    low_rank_group(ys, x, pools, plans)
    for got, wanted in zip(ys, expected, strict=True):
        assert float((got.double() - wanted).pow(2).mean().sqrt()) <= 4e-3 * float(wanted.pow(2).mean().sqrt())


def test_members_of_a_group_add_to_their_columns_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    segments = batch_of([(1, 8), (3, 5), (1, 0), (20, 16), (40, 24)])
    plan = LowRankPlan(segments, CPU, triton=True)
    widths = [32, 17, 48]
    pools = [make_pool(64, n, torch.float32, generator, pages=8) for n in widths]
    x, wide = torch.randn(65, 64, generator=generator), torch.randn(65, sum(widths), generator=generator)
    ys = wide.split(widths, dim=1)
    expected = [dense(ys[0], x, pools[0], segments), ys[1].clone(), dense(ys[2], x, pools[2], segments)]
    low_rank_group(ys, x, pools, [plan, None, plan])
    for got, wanted in zip(ys, expected, strict=True):
        assert float((got - wanted).pow(2).mean().sqrt()) <= 1e-5 * float(wanted.pow(2).mean().sqrt())


@pytest.mark.parametrize(
    ("second", "shares"),
    [
        (lambda wide: wide[:4, 16:32], False),
        (lambda wide: wide[:4, 15:31], True),
        (lambda wide: wide[1:5, :16], True),
        (lambda wide: wide[4:8, :16], False),
        (lambda wide: wide[4:8, 40:], False),
        (lambda wide: wide.view(16, 24)[8:12, :16], False),
        (lambda wide: wide.view(16, 24)[1:5, :16], True),
        (lambda wide: wide[3:7, 40:].clone(), False),
    ],
    ids=["columns", "columns in common", "rows in common", "rows apart", "both apart", "behind, another stride",
         "among, another stride", "another tensor"],
)  # fmt: skip
@pytest.mark.parametrize("swapped", [False, True])
def test_outputs_of_a_group_may_not_share_memory(
    second: Callable[[torch.Tensor], torch.Tensor], shares: bool, swapped: bool
) -> None:
    pools = [make_pool(16, n, torch.float32, torch.Generator().manual_seed(0), pages=1) for n in (16, 8)]
    plan, x, wide = LowRankPlan(batch_of([(4, 8)]), CPU, triton=True), torch.ones(4, 16), torch.zeros(8, 48)
    ys, width = [wide[:4, :16], second(wide)], second(wide).shape[1]
    own = [pools[0], pools[0] if width == 16 else pools[1]]
    order = [1, 0] if swapped else [0, 1]
    given_ = [ys[i] for i in order], x, [own[i] for i in order], [plan, plan]
    if shares:
        with pytest.raises(ValueError, match="ys: 0 and 1 share memory"):
            low_rank_group(*given_)
        assert not wide.any()
    else:
        low_rank_group(*given_)
        assert ys[0].any()
        assert ys[1].any()


def test_a_row_with_nan_reaches_no_other_row() -> None:
    pool = make_pool(32, 16, torch.float32, torch.Generator().manual_seed(0), pages=8)
    segments = batch_of([(1, 8), (1, 5), (20, 16), (70, 8)])
    x = torch.randn(92, 32)
    plan = LowRankPlan(segments, CPU, triton=True)
    clean = low_rank(torch.zeros(92, 16), x, pool, plan)
    for row in (1, 3, 50):
        poisoned = x.clone()
        poisoned[row] = float("nan")
        out = low_rank(torch.zeros(92, 16), poisoned, pool, plan)
        assert out[row].isnan().all()
        others = torch.arange(92) != row
        assert torch.equal(out[others], clean[others])


def test_pages_of_others_are_not_read() -> None:
    """A segment's own pages are the only ones that count, also where its rank leaves half of a dot's 16 lanes."""
    pool = make_pool(32, 16, torch.bfloat16, torch.Generator().manual_seed(0), pages=6)
    segments = [LowRankSegment(0, 1, tuple(range(8, 16))), LowRankSegment(1, 9, tuple(range(24, 32)))]
    for pooled in pool:
        pooled[[r for r in range(48) if r // 8 not in (1, 3)]] = float("nan")
    out = low_rank(
        torch.zeros(9, 16).bfloat16(), torch.ones(9, 32).bfloat16(), pool, LowRankPlan(segments, CPU, triton=True)
    )
    assert not out.isnan().any()


def test_the_op_is_well_formed() -> None:
    from chorus.kernels.low_rank_launch import low_rank_op

    pool = make_pool(32, 16, torch.float32, torch.Generator().manual_seed(0), pages=3)
    plan = LowRankPlan(batch_of([(1, 8), (20, 16)]), CPU, triton=True)
    assert plan.tables is not None
    arguments = (torch.zeros(21, 16), torch.randn(21, 32), *pool, plan.tables.buffer, plan.tables.flat_geometry)
    torch.library.opcheck(low_rank_op, arguments)


def test_what_does_not_fit_is_refused_by_name() -> None:
    pool = make_pool(32, 16, torch.float32, torch.Generator().manual_seed(0), pages=2)
    x, y = torch.zeros(2, 32), torch.zeros(2, 16)
    plan = LowRankPlan([LowRankSegment(0, 2, (0,))], CPU, triton=True)
    with pytest.raises(ValueError, match="segments: pool rows"):
        LowRankPlan([LowRankSegment(0, 2, (3, 4))], CPU, triton=True)
    with pytest.raises(ValueError, match="segments: pool row -1"):
        LowRankPlan([LowRankSegment(0, 2, (-1,))], CPU, triton=True)
    with pytest.raises(ValueError, match="x: must be contiguous"):
        low_rank(y, torch.zeros(32, 2).T, pool, plan)
    with pytest.raises(ValueError, match="pool: the plan names 24 rows"):
        low_rank(y, x, pool, LowRankPlan([LowRankSegment(0, 2, tuple(range(16, 24)))], CPU, triton=True))
    with pytest.raises(ValueError, match="y: on meta"):
        low_rank(y.to("meta"), x, pool, plan)
    with pytest.raises(ValueError, match="exceed Capacity"):
        LowRankPlan([LowRankSegment(0, 2, (0,))], CPU, triton=True, capacity=Capacity(1, 8, Family.ROWS))
