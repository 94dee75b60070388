"""low_rank with activations, biases, scales and rows' vectors: specification and CPU against float64 row by row."""

import pytest
import torch

from chorus.kernels import (
    Activation,
    Epilogue,
    LowRankPlan,
    LowRankSegment,
    RankPool,
    low_rank,
    low_rank_group,
    reference,
)
from support.epilogue import MIXED, defined, make_epilogue, segments_of, without
from support.low_rank import BOUND, make_pool

CPU = torch.device("cpu")
PAGES, K, N, ROWS = 16, 96, 160, 53


def batch(dtype: torch.dtype, *, from_zero: bool = False) -> tuple[torch.Tensor, torch.Tensor, RankPool, Epilogue]:
    generator = torch.Generator().manual_seed(0)
    pool = make_pool(K, N, dtype, generator, pages=PAGES)
    x = (torch.randn(ROWS, K, generator=generator) / K**0.5).to(dtype)
    y = torch.randn(ROWS, N, generator=generator).to(dtype) * (not from_zero)
    return y, x, pool, make_epilogue(PAGES * 8, N, dtype, generator)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())


def test_specification_equals_the_definition() -> None:
    y, x, pool, epilogue = batch(torch.float64)
    segments = segments_of(MIXED)
    got = reference.low_rank(y.clone(), x, pool, segments, epilogue)
    assert error(got, defined(y, x, pool, segments, epilogue)) <= 1e-7  # mid_scale is float32


@pytest.mark.parametrize("kept", [(), *((name,) for name in Epilogue._fields), Epilogue._fields], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("from_zero", [False, True])
def test_any_part_of_an_epilogue_equals_the_definition(
    kept: tuple[str, ...], dtype: torch.dtype, from_zero: bool
) -> None:
    y, x, pool, epilogue = batch(dtype, from_zero=from_zero)
    vectors = set(kept) - {"mid_bias"}
    layout = [(rows, rank, act, vector if vectors else None) for rows, rank, act, vector in MIXED]
    segments, epilogue = segments_of(layout), without(epilogue, kept)
    expected = defined(y, x, pool, segments, epilogue)
    got = low_rank(y.clone(), x, pool, LowRankPlan(segments, CPU), epilogue)
    assert error(got, expected) <= BOUND[dtype][0]
    assert torch.equal(got[[0, -1]], y[[0, -1]])


@pytest.mark.parametrize("activation", Activation)
def test_a_decode_step_of_one_kind(activation: Activation) -> None:
    y, x, pool, epilogue = batch(torch.bfloat16)
    segments = segments_of([(1, 8, activation, i % 4) for i in range(12)])
    expected = defined(y, x, pool, segments, epilogue)
    assert error(low_rank(y.clone(), x, pool, LowRankPlan(segments, CPU), epilogue), expected) <= 4e-3


def test_what_does_not_fit_is_refused_by_name() -> None:
    y, x, pool, epilogue = batch(torch.float32)
    plan = LowRankPlan([LowRankSegment(0, 2, (0,), Activation.RELU, 3)], CPU)
    for bad, named in {
        "segments name vectors": None,
        "mid_bias must be": epilogue._replace(mid_bias=torch.zeros(3)),
        "out_bias must be": epilogue._replace(out_bias=torch.zeros(3, N)),
        "row_scale must be": epilogue._replace(row_scale=torch.zeros(4, N + 1)),
        "out_scale must be contiguous": epilogue._replace(out_scale=torch.zeros(4, 2 * N)[:, ::2]),
        "row_add must be contiguous, in": epilogue._replace(row_add=torch.zeros(4, N).double()),
        "row_add is on meta": epilogue._replace(row_add=torch.zeros(4, N, device="meta")),
    }.items():
        with pytest.raises(ValueError, match=f"epilogue: {bad}"):
            low_rank(y, x, pool, plan, named)
    with pytest.raises(ValueError, match="segments: vector -1"):
        LowRankPlan([LowRankSegment(0, 2, (0,), Activation.RELU, -1)], CPU)
    with pytest.raises(ValueError, match="segments name vectors"):
        low_rank_group([y], x, [pool], [plan])


def test_what_has_no_gradient_is_refused_by_name() -> None:
    y, x, pool, epilogue = batch(torch.float32)
    x.requires_grad_()
    with pytest.raises(ValueError, match="epilogue: has no backward"):
        low_rank(y, x, pool, LowRankPlan([LowRankSegment(0, 2, (0,), vector=1)], CPU), epilogue)
    with pytest.raises(ValueError, match="epilogue: has no backward"):
        low_rank(y, x.detach(), pool, LowRankPlan([], CPU), Epilogue(mid_bias=torch.zeros(PAGES * 8).requires_grad_()))
    with pytest.raises(ValueError, match="segments: activations have no backward"):
        low_rank(y, x, pool, LowRankPlan([LowRankSegment(0, 2, (0,), Activation.TANH)], CPU))
