"""low_rank over all slots at once, in the interpreter: the family SLOTS against dense float64 math, and what it keeps
apart though its programs have many adapters' rows and lanes in one product."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chorus.kernels import Epilogue, LowRankPlan, LowRankSegment, RankPool, low_rank, reference
from chorus.kernels.low_rank_tables import Capacity
from chorus.kernels.tuning import Family
from support.epilogue import MIXED, defined, make_epilogue, segments_of
from support.low_rank import BOUND, batch_of, check, make_pool

CPU = torch.device("cpu")
# Blocks of 16 rows: many adapters in one, a segment over several, empty ones, more lanes than a program has at a time.
LAYOUTS = {
    "a decode step of many adapters": [(2, 16), (5, 8), (1, 16), (9, 24), (3, 16), (12, 8)],
    "a segment over four blocks beside lone rows": [(1, 16), (1, 8), (50, 16), (1, 40), (1, 5)],
    "all distinct": [(1, 16)] * 20,
    "more lanes than a turn has": [(2, 100), (15, 64), (1, 130)],
    "blocks without an adapter": [(3, 8), (40, 0), (2, 24), (17, 0)],
    "one adapter": [(48, 16)],
}


def plan_of(segments: list[LowRankSegment], rows: int, *, activated: bool = False) -> LowRankPlan:
    """A plan that holds them and no more."""
    rank = max((len(s.pool_rows) for s in segments), default=0)
    plan = LowRankPlan([], CPU, triton=True, capacity=Capacity(rows, rank, Family.SLOTS, activated))
    plan.rewrite(segments)
    return plan


@st.composite
def layouts(draw: st.DrawFn) -> list[tuple[int, int]]:
    ranks = st.one_of(st.sampled_from([0, 8, 16, 24]), st.integers(1, 40))
    lengths = st.one_of(st.just(1), st.integers(0, 9), st.sampled_from([16, 20]))
    return draw(st.lists(st.tuples(lengths, ranks), max_size=4))


@settings(max_examples=10, deadline=None)
@given(
    layout=layouts(), k=st.sampled_from([1, 33, 80]), n=st.sampled_from([1, 16, 65]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), seed=st.integers(0, 99),
    from_zero=st.booleans(), first_row=st.integers(0, 20), scatter=st.one_of(st.none(), st.integers(0, 9)),
)  # fmt: skip
def test_all_slots_equal_dense_float64_math(
    layout: list[tuple[int, int]], k: int, n: int, dtype: torch.dtype, seed: int, from_zero: bool, first_row: int,
    scatter: int | None,
) -> None:  # fmt: skip
    if dtype is not torch.float32:
        # The RMS of rows of which few have many times the others' rank says little of theirs, as that of rank 1 does:
        # numbers of 7 times the RMS are common there, and one rounding of the middle in 16 bits passes the bound.
        layout = [(rows, 8 + rank % 9 if rank else 0) for rows, rank in layout]
        if min(k, n) < 16:
            k, n = 33, 65  # an RMS of a few roundings means nothing
    segments = batch_of(layout, first_row=first_row, scatter=scatter)
    total = first_row + sum(rows for rows, _ in layout) + 1
    check(segments, total, k, n, dtype, seed=seed, from_zero=from_zero, plan=plan_of(segments, total))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_of_real_batches(layout: list[tuple[int, int]]) -> None:
    """K of 272 leaves splits without work, N of 80 a last tile in part."""
    segments, total = batch_of(layout, scatter=1), sum(rows for rows, _ in layout)
    check(segments, total, 272, 80, torch.float32, plan=plan_of(segments, total))


@pytest.mark.parametrize("from_zero", [False, True])
def test_a_decode_step_in_bfloat16(from_zero: bool) -> None:
    layout = LAYOUTS["a decode step of many adapters"]
    segments, total = batch_of(layout, scatter=1), sum(rows for rows, _ in layout)
    check(segments, total, 272, 272, torch.bfloat16, from_zero=from_zero, plan=plan_of(segments, total))


@pytest.mark.parametrize("k", [1200, 4112])
def test_splits_of_several_blocks_of_k(k: int) -> None:
    segments = batch_of([(1, 16), (3, 8)])
    check(segments, 4, k, 16, torch.bfloat16, plan=plan_of(segments, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_row_has_its_own_activation_and_vectors(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    pool = make_pool(48, 65, dtype, generator, pages=16)
    x = (torch.randn(53, 48, generator=generator) / 48**0.5).to(dtype)
    y = torch.randn(53, 65, generator=generator).to(dtype)
    segments, epilogue = segments_of(MIXED), make_epilogue(128, 65, dtype, generator)
    plan = plan_of(segments, 53, activated=True)
    expected = defined(y, x, pool, segments, epilogue)
    got, again = (low_rank(y.clone(), x, pool, plan, epilogue) for _ in range(2))
    error = (got.double() - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()
    assert float(error) <= BOUND[dtype][0]
    assert torch.equal(got[[0, -1]], y[[0, -1]])
    assert torch.equal(got, again)


def test_vectors_alone_need_no_rank() -> None:
    segments = [LowRankSegment(1, 4, (), vector=1), LowRankSegment(20, 21, (), vector=0)]
    pool = make_pool(16, 16, torch.float32, torch.Generator().manual_seed(0), pages=1)
    vectors, y = torch.randn(2, 16), torch.randn(24, 16)
    got = low_rank(y.clone(), torch.randn(24, 16), pool, plan_of(segments, 24), Epilogue(row_scale=vectors))
    expected = y.clone()
    expected[1:4] *= vectors[1]
    expected[20] *= vectors[0]
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_rows_bits_do_not_depend_on_who_else_is_in_the_batch(dtype: torch.dtype) -> None:
    """Wherever its row and its lanes come to lie among others'. Of whole numbers, whose sums are exact: the interpreter
    multiplies by numpy, whose order of summing a row is by where it lies."""
    layout = LAYOUTS["a decode step of many adapters"]
    segments, rows = batch_of(layout, scatter=2), sum(rows for rows, _ in layout)
    generator = torch.Generator().manual_seed(0)

    def whole(*shape: int) -> torch.Tensor:
        return torch.randint(-4, 5, shape, generator=generator).to(dtype)

    random = make_pool(80, 48, dtype, generator, pages=sum(rank // 8 for _, rank in layout))
    pool = RankPool(whole(*random.a.shape), whole(*random.b.shape), torch.full_like(random.mid_scale, 0.5))
    x, y = whole(rows, 80), whole(rows, 48)
    together = low_rank(y.clone(), x, pool, plan_of(segments, rows))
    for s in segments:
        own = slice(s.start, s.end)
        alone = low_rank(
            y[own].clone(), x[own].clone(), pool, plan_of([LowRankSegment(0, s.end - s.start, s.pool_rows)], 16)
        )
        assert torch.equal(together[own], alone)


@pytest.mark.parametrize("which", ["x", "a", "b", "mid_scale"])
def test_one_adapters_nan_reaches_no_other_row(which: str) -> None:
    """Neighbours share tiles with it: 0 * NaN would be theirs too."""
    segments = batch_of([(3, 16), (4, 8), (14, 24)])
    pool = make_pool(32, 48, torch.bfloat16, torch.Generator().manual_seed(0), pages=6)
    x, y = torch.randn(21, 32).bfloat16(), torch.randn(21, 48).bfloat16()
    clean = low_rank(y.clone(), x, pool, plan_of(segments, 21))
    poisoned = RankPool(*(t.clone() for t in pool))
    guilty = segments[1]
    if which == "x":
        x = x.clone()
        x[guilty.start : guilty.end] = float("nan")
    else:
        getattr(poisoned, which)[list(guilty.pool_rows)] = float("nan")
    got = low_rank(y.clone(), x, poisoned, plan_of(segments, 21))
    assert got[guilty.start : guilty.end].isnan().all()
    for s in (segments[0], segments[2]):
        assert torch.equal(got[s.start : s.end], clean[s.start : s.end])


def test_rows_of_nobody_are_not_written() -> None:
    """Among rows of adapters, in one tile with them: adding nothing would turn -0.0 into 0.0."""
    segments = batch_of([(2, 8), (3, 0), (4, 8), (20, 0)])
    pool = make_pool(32, 16, torch.float32, torch.Generator().manual_seed(0), pages=2)
    got = low_rank(torch.full((29, 16), -0.0), torch.randn(29, 32), pool, plan_of(segments, 29))
    for rows in (slice(2, 5), slice(9, 29)):
        assert torch.equal(got[rows], torch.zeros_like(got[rows]))
        assert got[rows].signbit().all()


def test_pages_of_nobody_in_the_batch_are_not_read() -> None:
    pool = make_pool(32, 16, torch.bfloat16, torch.Generator().manual_seed(0), pages=6)
    segments = [LowRankSegment(0, 1, tuple(range(8, 16))), LowRankSegment(1, 9, tuple(range(24, 32)))]
    for pooled in pool:
        pooled[[r for r in range(48) if r // 8 not in (1, 3)]] = float("nan")
    out = low_rank(torch.zeros(9, 16).bfloat16(), torch.ones(9, 32).bfloat16(), pool, plan_of(segments, 9))
    assert not out.isnan().any()


def test_gradients_equal_the_specifications() -> None:
    segments = batch_of([(2, 8), (5, 24), (20, 5)])
    generator = torch.Generator().manual_seed(0)
    numbers = [torch.randn(s, generator=generator) for s in ((27, 33), (27, 48), (40, 48), (40, 33))]
    scale, of_y = torch.rand(40, generator=generator) + 0.5, torch.randn(27, 33, generator=generator)
    both = []
    for dtype in (torch.float64, torch.float32):
        y, x, a, b = (t.to(dtype).requires_grad_() for t in numbers)
        pool = RankPool(a, b, scale)
        if dtype is torch.float64:
            out = reference.low_rank(y.clone(), x, pool, segments)
        else:
            out = low_rank(y.clone(), x, pool, plan_of(segments, 27))
        out.backward(of_y.to(dtype))
        both.append([t.grad for t in (x, a, b) if t.grad is not None])
    for expected, got in zip(*both, strict=True):
        assert float((got - expected).pow(2).mean().sqrt()) <= 1e-5 * float(expected.pow(2).mean().sqrt())
