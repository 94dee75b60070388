"""The backward of low_rank on Triton, in the interpreter, against the specification's autograd in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chorus.kernels import LowRankPlan, LowRankSegment, RankPool, low_rank, reference

CPU = torch.device("cpu")
BOUND = {torch.float32: 1e-5, torch.bfloat16: 6e-3}
BATCHES = {
    "few rows": [(0, 1, 1, 8), (1, 2, 3, 5), (2, 6, 6, 24)],
    "long": [(1, 41, 0, 16), (45, 115, 4, 40)],
    "wide": [(0, 33, 0, 70)],
}


def segments_of(batch: list[tuple[int, int, int, int]]) -> list[LowRankSegment]:
    """From (first row, end, first page, rank) each."""
    return [LowRankSegment(start, end, tuple(range(8 * page, 8 * page + rank))) for start, end, page, rank in batch]


def gradients(
    segments: list[LowRankSegment], k: int, n: int, dtype: torch.dtype, how: str, seed: int = 0
) -> list[torch.Tensor]:
    """Output and the gradients of y, x, a, b, from numbers that `dtype` holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.float64 if how == "specification" else dtype
    y, x, a, b = (
        torch.randn(shape, generator=generator).to(dtype).to(kept).requires_grad_()
        for shape in ((116, n), (116, k), (80, k), (80, n))
    )
    pool = RankPool(a, b, torch.rand(80, generator=generator) + 0.5)
    gradient = torch.randn(116, n, generator=generator).to(dtype).to(kept)
    if how == "specification":
        out = reference.low_rank(y.clone(), x, pool, segments)
    else:
        out = low_rank(y.clone(), x, pool, LowRankPlan(segments, CPU, triton=True))
    out.backward(gradient)
    return [out.detach(), *(t.grad for t in (y, x, a, b) if t.grad is not None)]


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_gradients_equal_the_specifications(batch: list[tuple[int, int, int, int]], dtype: torch.dtype) -> None:
    """bf16 rounds both s and what is summed over it, so it may err by half as much again as the forward."""
    arguments = (segments_of(batch), 48, 33, dtype)
    for expected, got, again in zip(
        *(gradients(*arguments, how) for how in ("specification", "triton", "triton")), strict=True
    ):
        error = (got.double() - expected).pow(2).mean().sqrt()
        assert float(error) <= BOUND[dtype] * float(expected.pow(2).mean().sqrt())
        assert torch.equal(got, again)
        assert torch.equal(got == 0, expected == 0)


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 20), rank=st.integers(1, 40), k=st.integers(1, 40), n=st.integers(1, 40))
def test_any_shape(rows: int, rank: int, k: int, n: int) -> None:
    segments = [LowRankSegment(2, 2 + rows, tuple(range(16, 16 + rank)))]
    both = [gradients(segments, k, n, torch.float32, how) for how in ("specification", "triton")]
    for expected, got in zip(*both, strict=True):
        assert float((got.double() - expected).pow(2).mean().sqrt()) <= 1e-5 * float(expected.pow(2).mean().sqrt())


def test_segments_that_share_pool_rows_are_refused() -> None:
    shared = [LowRankSegment(0, 1, (0, 1)), LowRankSegment(1, 2, (0, 1))]
    with pytest.raises(ValueError, match="share pool rows"):
        gradients(shared, 4, 4, torch.float32, "triton")


def test_the_ops_are_well_formed() -> None:
    from chorus.kernels.low_rank_launch import low_rank_keeping_s_op, weight_gradient_op

    tables = LowRankPlan(segments_of(BATCHES["few rows"]), CPU, triton=True).tables
    assert tables is not None
    x, a, b = torch.randn(6, 32), torch.randn(80, 32), torch.randn(80, 16)
    flat = tables.flat_geometry
    torch.library.opcheck(low_rank_keeping_s_op, (torch.zeros(6, 16), x, a, b, torch.ones(80), tables.buffer, flat))
    block, tiles = tables.gradient_tiles()
    pages_at = tables.geometry.pages_at
    torch.library.opcheck(weight_gradient_op, (torch.randn(6, 32), x, tables.buffer, pages_at, tiles, block, 80))
