"""low_rank's epilogue on Triton, in the interpreter, against float64 row by row; and as the one launch of a family."""

import pytest
import torch

from chorus.kernels import Activation, Epilogue, LowRankPlan, low_rank
from chorus.kernels.low_rank_tables import Capacity
from chorus.kernels.tuning import Family
from support.epilogue import MIXED, defined, make_epilogue, segments_of, without
from support.low_rank import BOUND, make_pool

CPU = torch.device("cpu")
PAGES, K, N, ROWS = 16, 48, 65, 53


@pytest.mark.parametrize(
    "kept", [(), ("mid_bias",), ("out_scale",), ("row_scale", "row_add"), Epilogue._fields], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_part_of_an_epilogue_equals_the_definition(kept: tuple[str, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    pool = make_pool(K, N, dtype, generator, pages=PAGES)
    x = (torch.randn(ROWS, K, generator=generator) / K**0.5).to(dtype)
    y = torch.randn(ROWS, N, generator=generator).to(dtype)
    vectors = set(kept) - {"mid_bias"}
    segments = segments_of([(rows, rank, act, vector if vectors else None) for rows, rank, act, vector in MIXED])
    epilogue = without(make_epilogue(PAGES * 8, N, dtype, generator), kept)
    plan = LowRankPlan(segments, CPU, triton=True)
    expected = defined(y, x, pool, segments, epilogue)
    got, again = (low_rank(y.clone(), x, pool, plan, epilogue) for _ in range(2))
    error = (got.double() - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()
    assert float(error) <= BOUND[dtype][0]
    assert torch.equal(got[[0, -1]], y[[0, -1]])
    assert torch.equal(got, again)


def test_few_rows_carry_an_epilogue_too() -> None:
    """In the one launch that they are."""
    generator = torch.Generator().manual_seed(0)
    pool = make_pool(K, 64, torch.bfloat16, generator, pages=PAGES)
    x, y = torch.randn(4, K, generator=generator).bfloat16(), torch.randn(4, 64, generator=generator).bfloat16()
    segments = segments_of([(1, 16, Activation.GELU, 0), (1, 40, Activation.NONE, None), (1, 0, Activation.NONE, 2)])
    epilogue = make_epilogue(PAGES * 8, 64, torch.bfloat16, generator)
    expected = defined(y, x, pool, segments, epilogue)
    got = low_rank(y.clone(), x, pool, LowRankPlan(segments, CPU, triton=True), epilogue)
    error = (got.double() - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()
    assert float(error) <= BOUND[torch.bfloat16][0]


def test_a_capacity_says_whether_batches_have_activations() -> None:
    segments = segments_of([(1, 8, Activation.RELU, None)])
    LowRankPlan([], CPU, triton=True, capacity=Capacity(4, 8, Family.ROWS, activated=True)).rewrite(segments)
    with pytest.raises(ValueError, match="segments: the capacity"):
        LowRankPlan([], CPU, triton=True, capacity=Capacity(4, 8, Family.ROWS)).rewrite(segments)
