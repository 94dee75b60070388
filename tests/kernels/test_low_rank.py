"""low_rank: the specification against dense float64 math row by row, the CPU families against the specification."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from chorus.kernels import LowRankPlan, LowRankSegment, RankPool, low_rank, low_rank_group, reference

CPU = torch.device("cpu")
POOL_ROWS = 320
BOUND = {torch.float32: 1e-5, torch.bfloat16: 4e-3}


def make_pool(k: int, n: int, dtype: torch.dtype, generator: torch.Generator) -> RankPool:
    return RankPool(
        a=torch.randn(POOL_ROWS, k, generator=generator).to(dtype),
        b=(torch.randn(POOL_ROWS, n, generator=generator) / k**0.5).to(dtype),
        mid_scale=torch.rand(POOL_ROWS, generator=generator) + 0.5,
    )


def dense(y: torch.Tensor, x: torch.Tensor, pool: RankPool, segments: list[LowRankSegment]) -> torch.Tensor:
    """Row by row in float64, from the definition: y + x (B^T diag(scale) A)^T with the dense weight written out."""
    out = y.double().clone()
    for s in segments:
        rows = list(s.pool_rows)
        weight = pool.b[rows].double().T @ torch.diag(pool.mid_scale[rows].double()) @ pool.a[rows].double()  # [N, K]
        for t in range(s.start, s.end):
            out[t] = y[t].double() + weight @ x[t].double()
    return out


def rms(t: torch.Tensor) -> float:
    return float(t.double().pow(2).mean().sqrt())


@st.composite
def batches(draw: st.DrawFn) -> tuple[int, list[LowRankSegment]]:
    """Segments with gaps, lengths 1..40 and ranks 1..48; pool rows contiguous or scattered."""
    segments: list[LowRankSegment] = []
    position, used = draw(st.integers(0, 3)), 0
    order = draw(st.permutations(range(POOL_ROWS))) if draw(st.booleans()) else list(range(POOL_ROWS))
    uniform = draw(st.booleans())
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 16)))
    for _ in range(draw(st.integers(0, 6))):
        length, rank = shape if uniform else (draw(st.integers(1, 40)), draw(st.integers(1, 48)))
        segments.append(LowRankSegment(position, position + length, tuple(order[used : used + rank])))
        used += rank
        position += length + (0 if uniform else draw(st.sampled_from([0, 0, 0, 2])))
    return position + draw(st.integers(1, 3)), segments


@settings(max_examples=60, deadline=None)
@given(
    batch=batches(), k=st.sampled_from([1, 8, 33, 64]), n=st.sampled_from([1, 16, 65]), seed=st.integers(0, 99),
    from_zero=st.booleans(),
)  # fmt: skip
def test_low_rank_equals_dense_float64_math(
    batch: tuple[int, list[LowRankSegment]], k: int, n: int, seed: int, from_zero: bool
) -> None:
    dtype = torch.float32
    total, segments = batch
    generator = torch.Generator().manual_seed(seed)
    pool = make_pool(k, n, dtype, generator)
    x = torch.randn(total, k, generator=generator).to(dtype)
    y = torch.zeros(total, n, dtype=dtype) if from_zero else torch.randn(total, n, generator=generator).to(dtype)
    expected = dense(y, x, pool, segments)
    assume(not segments or rms(expected) > 0.05)  # else what is left of terms that cancel: they are about 1
    got = low_rank(y.clone(), x, pool, LowRankPlan(segments, CPU))
    assert rms(got.double() - expected) <= BOUND[dtype] * max(rms(expected), 1e-30)
    touched = torch.zeros(total, dtype=torch.bool)
    for s in segments:
        touched[s.start : s.end] = True
    assert torch.equal(got[~touched], y[~touched])


LAYOUTS = {
    "a decode step of equal ranks": [(1, 16)] * 12,
    "mixed ranks": [(1, 8), (3, 24), (1, 64), (2, 5), (1, 33)],
    "prefill beside decodes": [(1, 16), (50, 16), (1, 8), (70, 48)],
}


def segments_of(layout: list[tuple[int, int]]) -> tuple[list[LowRankSegment], int]:
    """Neighbours from row 1 on, of (rows, rank) each; and how many rows the batch has."""
    segments, position, used = [], 1, 0
    for rows, rank in layout:
        segments.append(LowRankSegment(position, position + rows, tuple(range(used, used + rank))))
        position, used = position + rows, used + rank
    return segments, position + 2


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("from_zero", [False, True])
def test_low_rank_in_bf16_stays_within_its_bound(layout: list[tuple[int, int]], from_zero: bool) -> None:
    """At sizes where an RMS means something: single products err by up to half a bf16 ulp, 4e-3."""
    generator = torch.Generator().manual_seed(3)
    pool = make_pool(256, 192, torch.bfloat16, generator)
    segments, total = segments_of(layout)
    x = torch.randn(total, 256, generator=generator).bfloat16()
    y = torch.randn(total, 192, generator=generator).bfloat16() * (not from_zero)
    expected = dense(y, x, pool, segments)
    got = low_rank(y.clone(), x, pool, LowRankPlan(segments, CPU))
    assert rms(got.double() - expected) <= BOUND[torch.bfloat16] * rms(expected)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_members_of_a_group_add_to_their_columns_alone(layout: list[tuple[int, int]], dtype: torch.dtype) -> None:
    """Four columns ranges of one tensor: two members of the same pool rows, one of none, one with other rows."""
    generator = torch.Generator().manual_seed(5)
    segments, total = segments_of(layout)
    others = [LowRankSegment(s.start, s.end, tuple(row + 8 for row in s.pool_rows)) for s in segments]
    plan, other = LowRankPlan(segments, CPU), LowRankPlan(others, CPU)
    widths = [160, 96, 64, 128]
    pools = [make_pool(256, n, dtype, generator) for n in widths]
    x = torch.randn(total, 256, generator=generator).to(dtype)
    wide = torch.randn(total, sum(widths), generator=generator).to(dtype)
    ys = wide.split(widths, dim=1)
    expected = [
        dense(y, x, pool, used) for y, pool, used in zip(ys, pools, [segments, segments, [], others], strict=True)
    ]
    low_rank_group(ys, x, pools, [plan, plan, None, other])
    for got, wanted in zip(ys, expected, strict=True):
        assert rms(got.double() - wanted) <= BOUND[dtype] * rms(wanted)


@settings(max_examples=40, deadline=None)
@given(batch=batches(), seed=st.integers(0, 99))
def test_specification_equals_dense_float64_math(batch: tuple[int, list[LowRankSegment]], seed: int) -> None:
    total, segments = batch
    generator = torch.Generator().manual_seed(seed)
    pool = make_pool(16, 24, torch.float64, generator)
    x = torch.randn(total, 16, generator=generator, dtype=torch.float64)
    y = torch.randn(total, 24, generator=generator, dtype=torch.float64)
    got = reference.low_rank(y.clone(), x, pool, segments)
    torch.testing.assert_close(got, dense(y, x, pool, segments), rtol=1e-6, atol=1e-6)


def test_a_row_with_nan_reaches_no_other_row() -> None:
    generator = torch.Generator().manual_seed(0)
    pool = make_pool(8, 8, torch.float32, generator)
    segments = [LowRankSegment(0, 1, (0, 1)), LowRankSegment(1, 2, (2, 3, 4)), LowRankSegment(2, 3, (5,))]
    x = torch.randn(3, 8, generator=generator)
    clean = low_rank(torch.zeros(3, 8), x, pool, LowRankPlan(segments, CPU))
    x[1] = float("nan")
    poisoned = low_rank(torch.zeros(3, 8), x, pool, LowRankPlan(segments, CPU))
    assert poisoned[1].isnan().all()
    assert torch.equal(poisoned[[0, 2]], clean[[0, 2]])


def test_an_adapter_with_infinite_products_reaches_no_other_row() -> None:
    pool = RankPool(torch.ones(5, 4), torch.ones(5, 4), torch.ones(5))
    pool.a[0] = 3e38
    segments = [LowRankSegment(0, 1, (0, 1)), LowRankSegment(1, 2, (2, 3, 4))]
    out = low_rank(torch.zeros(2, 4), torch.ones(2, 4), pool, LowRankPlan(segments, CPU))
    assert torch.equal(out[1], torch.full((4,), 12.0))


def test_same_inputs_give_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(1)
    pool = make_pool(64, 64, torch.bfloat16, generator)
    segments = [LowRankSegment(0, 5, tuple(range(16))), LowRankSegment(5, 6, tuple(range(40, 49)))]
    x = torch.randn(6, 64, generator=generator).bfloat16()
    runs = [low_rank(torch.zeros(6, 64).bfloat16(), x, pool, LowRankPlan(segments, CPU)) for _ in range(2)]
    assert torch.equal(runs[0], runs[1])


def test_what_does_not_fit_is_refused_by_name() -> None:
    pool = make_pool(8, 8, torch.float32, torch.Generator())
    x, y = torch.zeros(2, 8), torch.zeros(2, 8)
    plan = LowRankPlan([LowRankSegment(0, 2, (0,))], CPU)
    with pytest.raises(ValueError, match="overlaps"):
        LowRankPlan([LowRankSegment(0, 2, (0,)), LowRankSegment(1, 3, (1,))], CPU)
    with pytest.raises(ValueError, match="pool"):
        low_rank(y, torch.zeros(2, 7), pool, plan)
    with pytest.raises(ValueError, match="x, y"):
        low_rank(torch.zeros(3, 8), x, pool, plan)
    with pytest.raises(ValueError, match="plan"):
        low_rank(y[:1], x[:1], pool, plan)
    with pytest.raises(ValueError, match="dtypes"):
        low_rank(y, x.double(), pool, plan)
    with pytest.raises(ValueError, match="x: must be contiguous"):
        low_rank(y, torch.zeros(8, 2).T, pool, plan)
    for bad in (torch.zeros(8, 2).T, torch.zeros(8).expand(2, 8), torch.zeros(2, 16)[:, ::2]):
        with pytest.raises(ValueError, match="y: rows must be contiguous"):
            low_rank(bad, x, pool, plan)
    with pytest.raises(ValueError, match="pool: the plan names 400 rows"):
        low_rank(y, x, pool, LowRankPlan([LowRankSegment(0, 2, (399,))], CPU))
    with pytest.raises(ValueError, match="ys, pools, plans: want as many"):
        low_rank_group([y, y], x, [pool], [plan])


@pytest.mark.parametrize("name", LAYOUTS)
def test_token_ids_are_one_hot_rows(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    segments, start, used = [], 0, 0
    for length, rank in LAYOUTS[name]:
        segments.append(LowRankSegment(start, start + length, tuple(range(used, used + rank))))
        start, used = start + length, used + rank
    pool = make_pool(50, 24, torch.float32, generator)
    ids = torch.randint(50, (start,), generator=generator)
    y = torch.randn(start, 24, generator=generator)
    expected = dense(y, torch.nn.functional.one_hot(ids, 50).float(), pool, segments)
    for got in (
        low_rank(y.clone(), ids, pool, LowRankPlan(segments, CPU)),
        reference.low_rank(y.clone(), ids, pool, segments),
    ):
        assert rms(got.double() - expected) <= BOUND[torch.float32] * rms(expected)
