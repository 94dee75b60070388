"""Linears that read the same tensor, computed as one: q, k and v; gate and up.

    x [T, K] ──> one GEMM ──> y [T, N1 + N2 + N3], each member's slice with its own adapters' deltas

The members stay the sites that adapters name; their weights are rows of the group's.
"""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chorus.kernels import low_rank_group
from chorus.models.linear import PACKED_FOR_ROWS, AdaptedLinear


class LinearGroup:
    """`members` in the order of their columns; all have a bias or none has."""

    def __init__(self, members: Sequence[AdaptedLinear]) -> None:
        self.members = tuple(members)
        self.widths = [member.out_features for member in members]
        self._starts = [0, *accumulate(self.widths)][:-1]
        self.weight, self.bias = self._join("weight"), self._join("bias")
        self.packed: Tensor | None = None
        for member in self.members:
            member.grouped_weight = partial(self._rows_of, member)

    def pack(self) -> None:
        """Lays the weight out for oneDNN, and drops what it was."""
        assert self.weight is not None
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, PACKED_FOR_ROWS)
        self.weight = None
        for member in self.members:
            member.weight = nn.Parameter(member.weight.new_empty(0), requires_grad=False)

    def _rows_of(self, member: AdaptedLinear) -> Tensor:
        """A member's weight, [out, in]."""
        weight = self.weight if self.packed is None else self.packed.to_dense()
        assert weight is not None
        start = self._starts[self.members.index(member)]
        return weight[start : start + member.out_features]

    def __call__(self, x: Tensor) -> Tensor:
        """[T, K] to [T, sum of N]."""
        if self.packed is None:
            assert self.weight is not None
            y = F.linear(x, self.weight, self.bias)
        else:
            y = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        if any(member.plan is not None for member in self.members):
            pools, plans = [member.pool for member in self.members], [member.plan for member in self.members]
            low_rank_group(y.split(self.widths, dim=1), x, pools, plans)
        return y

    def _join(self, name: str) -> Tensor | None:
        """The members' parameters as one; theirs become rows of it."""
        parts = [getattr(member, name) for member in self.members]
        if parts[0] is None:
            return None
        whole = torch.cat([part.detach() for part in parts])
        for member, rows in zip(self.members, whole.split(self.widths), strict=True):
            setattr(member, name, nn.Parameter(rows, requires_grad=False))
        return whole
