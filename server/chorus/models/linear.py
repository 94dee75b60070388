"""Linears that add the batch's low-rank deltas: nn.Linear and GPT-2's Conv1D, wrapped in place, weights shared.

They subclass what they replace because models look at their linears' weights. A layer without adapters in the batch
costs one attribute read more than the base.

On CPU in bf16 the weight is packed (`PackedWeight`), and kept only so (16 rows, the linears of a 144M Llama, 2 cores:
41 ms a step where it is not, 22 where it is for oneDNN's loop, 18 with the kernel for few rows).
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from chorus.kernels import LowRankPlan, PackedWeight, RankPool, low_rank
from chorus.models.sites import Site


class DeltaMixin:
    """`pool` holds the site's adapter weights once there are any; `plan` is set before each step by the runner."""

    site: Site
    weight: Any
    bias: Any
    pool: RankPool | None = None
    plan: LowRankPlan | None = None
    packed: PackedWeight | None = None
    grouped_weight: Callable[[], Tensor] | None = None
    """Gives the weight, [out, in], where it is rows of a group's."""

    @property
    def has_deltas(self) -> bool:
        """Whether the batch has some."""
        return self.plan is not None and self.pool is not None

    def add_delta(self, y: Tensor, x: Tensor) -> Tensor:
        if self.plan is None or self.pool is None:
            return y
        low_rank(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), self.pool, self.plan)
        return y

    def pack(self, *, keep_weight: bool) -> None:
        """Packs the weight; what it was is dropped unless others share it."""
        weight = self.weight.detach()
        rows = weight.T.contiguous() if self.site.transposed else weight  # [out, in]
        self.packed = PackedWeight(rows)
        if not keep_weight:
            self.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)

    def base_weight(self) -> Tensor:
        """The weight as the module held it: [out, in], [in, out] for Conv1D."""
        if self.grouped_weight is not None:
            return self.grouped_weight()
        if self.weight.numel() or self.packed is None:
            kept: Tensor = self.weight.detach()
            return kept
        weight = self.packed.dense()
        return weight.T if self.site.transposed else weight


class AdaptedLinear(DeltaMixin, nn.Linear):
    """y = x W^T + b, plus the batch's deltas."""

    def __init__(self, base: nn.Linear, site: Site) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.site = site

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return self.add_delta(self.packed.linear(x, self.bias), x)
        return self.add_delta(F.linear(x, self.weight, self.bias), x)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + y, rounded once where the sum rides on the product."""
        if self.packed is None:
            plain: Tensor = self(x)
            return plain.add_(residual)
        return self.add_delta(self.packed.linear(x, self.bias, residual), x)


class AdaptedConv1D(DeltaMixin, Conv1D):
    """y = x W + b with W [in, out], plus the batch's deltas."""

    def __init__(self, base: Conv1D, site: Site) -> None:
        nn.Module.__init__(self)
        self.nf, self.nx = base.nf, base.nx
        self.weight, self.bias = base.weight, base.bias
        self.site = site

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return self.add_delta(self.packed.linear(x, self.bias), x)
        return self.add_delta(super().forward(x), x)  # type: ignore[no-untyped-call]


AdaptedLinears = AdaptedLinear | AdaptedConv1D


def wrap(linear: nn.Module, site: Site) -> AdaptedLinears:
    """The adapted form of a linear; shares its parameters."""
    if isinstance(linear, Conv1D):
        return AdaptedConv1D(linear, site)
    assert isinstance(linear, nn.Linear)
    return AdaptedLinear(linear, site)
