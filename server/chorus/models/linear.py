"""Linears that add the batch's low-rank deltas: nn.Linear and GPT-2's Conv1D, wrapped in place, weights shared.

They subclass what they replace because models look at their linears' weights. A layer without adapters in the batch
costs one attribute read more than the base.

On CPU in bf16 the weight is kept in the layout that oneDNN computes with, and only there (16 rows, the linears of a
144M Llama, 2 cores: 22 ms a step where the plain layout takes 41). These are the operators that Inductor emits for it.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from chorus.kernels import LowRankPlan, RankPool, low_rank
from chorus.models.sites import Site

# Rows that the packed layout is made for; it is as fast as the plain one at 512 and twice as fast at 16.
PACKED_FOR_ROWS = 16


class DeltaMixin:
    """`pool` holds the site's adapter weights once there are any; `plan` is set before each step by the runner."""

    site: Site
    weight: Any
    bias: Any
    pool: RankPool | None = None
    plan: LowRankPlan | None = None
    packed: Tensor | None = None
    grouped_weight: Callable[[], Tensor] | None = None
    """Gives the weight, [out, in], where it is rows of a group's."""

    def add_delta(self, y: Tensor, x: Tensor) -> Tensor:
        if self.plan is None or self.pool is None:
            return y
        low_rank(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), self.pool, self.plan)
        return y

    def pack(self, *, keep_weight: bool) -> None:
        """Lays the weight out for oneDNN; what it was is dropped unless others share it."""
        weight = self.weight.detach()
        rows = weight.T.contiguous() if self.site.transposed else weight  # [out, in]
        self.packed = torch.ops.mkldnn._reorder_linear_weight(rows, PACKED_FOR_ROWS)
        if not keep_weight:
            self.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)

    def base_weight(self) -> Tensor:
        """The weight as the module held it: [out, in], [in, out] for Conv1D."""
        if self.grouped_weight is not None:
            return self.grouped_weight()
        if self.weight.numel() or self.packed is None:
            kept: Tensor = self.weight.detach()
            return kept
        weight = self.packed.to_dense()
        return weight.T if self.site.transposed else weight

    def packed_forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return self.add_delta(y, x)


class AdaptedLinear(DeltaMixin, nn.Linear):
    """y = x W^T + b, plus the batch's deltas."""

    def __init__(self, base: nn.Linear, site: Site) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.site = site

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return self.packed_forward(x)
        return self.add_delta(F.linear(x, self.weight, self.bias), x)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + y, rounded once where the sum rides on the product."""
        if self.packed is None:
            plain: Tensor = self(x)
            return plain.add_(residual)
        y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.packed, self.bias, "add")
        return self.add_delta(y, x)


class AdaptedConv1D(DeltaMixin, Conv1D):
    """y = x W + b with W [in, out], plus the batch's deltas."""

    def __init__(self, base: Conv1D, site: Site) -> None:
        nn.Module.__init__(self)
        self.nf, self.nx = base.nf, base.nx
        self.weight, self.bias = base.weight, base.bias
        self.site = site

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return self.packed_forward(x)
        return self.add_delta(super().forward(x), x)  # type: ignore[no-untyped-call]


AdaptedLinears = AdaptedLinear | AdaptedConv1D


def wrap(linear: nn.Module, site: Site) -> AdaptedLinears:
    """The adapted form of a linear; shares its parameters."""
    if isinstance(linear, Conv1D):
        return AdaptedConv1D(linear, site)
    assert isinstance(linear, nn.Linear)
    return AdaptedLinear(linear, site)
