"""The backward of low_rank: numerical gradients in float64, and the specification's own autograd."""

import pytest
import torch

from chorus.kernels import LowRankPlan, LowRankSegment, RankPool, low_rank, reference

CPU = torch.device("cpu")
SEGMENTS = [
    LowRankSegment(1, 4, (0, 1, 2)),
    LowRankSegment(4, 4, (20,)),
    LowRankSegment(4, 5, (9, 8, 10, 17, 16)),
    LowRankSegment(7, 11, (24,)),
]


def tensors(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y [12, 6], x [12, 7], a [26, 7], b [26, 6] that want gradients, and mid_scale."""
    generator = torch.Generator().manual_seed(0)
    y, x, a, b = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((12, 6), (12, 7), (26, 7), (26, 6))
    )
    return y, x, a, b, torch.rand(26, generator=generator) + 0.5


def test_gradients_equal_numerical_ones() -> None:
    *wanted, mid_scale = tensors(torch.float64)
    plan = LowRankPlan(SEGMENTS, CPU)

    def through(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return low_rank(y.clone(), x, RankPool(a, b, mid_scale), plan)

    assert torch.autograd.gradcheck(through, wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_output_and_gradients_equal_the_specifications(dtype: torch.dtype) -> None:
    results = []
    for specification in (True, False):
        y, x, a, b, mid_scale = tensors(dtype)
        pool = RankPool(a, b, mid_scale)
        if specification:
            out = reference.low_rank(y.clone(), x, pool, SEGMENTS)
        else:
            out = low_rank(y.clone(), x, pool, LowRankPlan(SEGMENTS, CPU))
        out.backward(torch.linspace(-1, 1, 72, dtype=dtype).view(12, 6))
        results.append([out, *(t.grad for t in (y, x, a, b))])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_nothing_but_x_and_s_is_kept_of_the_batch() -> None:
    """s is as wide as the largest rank, 5; y has 6 columns."""
    saved: list[torch.Size] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    y, x, a, b, mid_scale = tensors(torch.float32)
    plan = LowRankPlan(SEGMENTS, CPU)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        low_rank(y.clone(), x, RankPool(a, b, mid_scale), plan)
    assert sorted(saved) == sorted([x.shape, torch.Size([12, 5]), a.shape, b.shape, mid_scale.shape])


def test_what_has_no_gradient_is_refused_by_name() -> None:
    y, x, a, b, mid_scale = tensors(torch.float32)
    plan = LowRankPlan(SEGMENTS, CPU)
    with pytest.raises(ValueError, match="mid_scale"):
        low_rank(y.clone(), x, RankPool(a, b, mid_scale.requires_grad_()), plan)
    with pytest.raises(ValueError, match="token ids"):
        low_rank(y.clone(), torch.zeros(12, dtype=torch.int64), RankPool(a, b, mid_scale.detach()), plan)
