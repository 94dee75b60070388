"""Linears that add the batch's low-rank deltas: nn.Linear and GPT-2's Conv1D, wrapped in place, weights shared.

They subclass what they replace because models look at their linears' weights. A layer without adapters in the batch
costs one attribute read more than the base.
"""

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from chorus.kernels import LowRankPlan, RankPool, low_rank
from chorus.models.sites import Site


class DeltaMixin:
    """`pool` holds the site's adapter weights once there are any; `plan` is set before each step by the runner."""

    site: Site
    pool: RankPool | None = None
    plan: LowRankPlan | None = None

    def add_delta(self, y: Tensor, x: Tensor) -> Tensor:
        if self.plan is None or self.pool is None:
            return y
        low_rank(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), self.pool, self.plan)
        return y


class AdaptedLinear(DeltaMixin, nn.Linear):
    """y = x W^T + b, plus the batch's deltas."""

    def __init__(self, base: nn.Linear, site: Site) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.site = site

    def forward(self, x: Tensor) -> Tensor:
        return self.add_delta(super().forward(x), x)


class AdaptedConv1D(DeltaMixin, Conv1D):
    """y = x W + b with W [in, out], plus the batch's deltas."""

    def __init__(self, base: Conv1D, site: Site) -> None:
        nn.Module.__init__(self)
        self.nf, self.nx = base.nf, base.nx
        self.weight, self.bias = base.weight, base.bias
        self.site = site

    def forward(self, x: Tensor) -> Tensor:
        return self.add_delta(super().forward(x), x)  # type: ignore[no-untyped-call]


Adapted = AdaptedLinear | AdaptedConv1D


def wrap(linear: nn.Module, site: Site) -> Adapted:
    """The adapted form of a linear; shares its parameters."""
    if isinstance(linear, Conv1D):
        return AdaptedConv1D(linear, site)
    assert isinstance(linear, nn.Linear)
    return AdaptedLinear(linear, site)
