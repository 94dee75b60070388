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

from chorus.kernels import PackedWeight, low_rank_group
from chorus.models.linear import AdaptedLinear


class LinearGroup:
    """`members` in the order of their columns; all have a bias or none has."""

    def __init__(self, members: Sequence[AdaptedLinear]) -> None:
        self.members = tuple(members)
        self.widths = [member.out_features for member in members]
        self._starts = [0, *accumulate(self.widths)][:-1]
        self.weight, self.bias = self._join("weight"), self._join("bias")
        self.packed: PackedWeight | None = None
        for member in self.members:
            member.grouped_weight = partial(self._rows_of, member)

    def pack(self) -> None:
        """Packs the weight, and drops what it was."""
        assert self.weight is not None
        self.packed = PackedWeight(self.weight)
        self.weight = None
        for member in self.members:
            member.weight = nn.Parameter(member.weight.new_empty(0), requires_grad=False)

    @property
    def has_deltas(self) -> bool:
        """Whether the batch has some for one of them."""
        return any(member.plan is not None for member in self.members)

    def _rows_of(self, member: AdaptedLinear) -> Tensor:
        """A member's weight, [out, in]."""
        weight = self.weight if self.packed is None else self.packed.dense()
        assert weight is not None
        start = self._starts[self.members.index(member)]
        return weight[start : start + member.out_features]

    def __call__(self, x: Tensor) -> Tensor:
        """[T, K] to [T, sum of N]."""
        if self.packed is None:
            assert self.weight is not None
            y = F.linear(x, self.weight, self.bias)
        else:
            y = self.packed.linear(x, self.bias)
        if self.has_deltas:
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
