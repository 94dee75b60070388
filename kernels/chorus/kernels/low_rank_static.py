"""`StaticLowRank`: plans of many sites, of one size and place for all batches within a capacity, written anew in place.

What is recorded with them, a CUDA graph or a CPU's tape, is replayed for any of these batches.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from chorus.kernels.dispatch import runs_triton
from chorus.kernels.low_rank import LowRankPlan
from chorus.kernels.low_rank_cpu import StaticSegments
from chorus.kernels.low_rank_tables import Capacity, StaticTables, check_capacity
from chorus.kernels.types import LowRankSegment


class StaticLowRank:
    """Plans of `count` sites, of no segments at first. `triton` says whether Triton runs (on CUDA if None)."""

    def __init__(self, count: int, capacity: Capacity, device: torch.device, *, triton: bool | None = None) -> None:
        self._tables: StaticTables | _CpuTables
        if runs_triton(device, triton):
            tables = self._tables = StaticTables(count, capacity, device)
            self.plans = [LowRankPlan((), device, triton=True, tables=own) for own in tables.tables]
        else:
            cpu = self._tables = _CpuTables(count, capacity)
            self.plans = [LowRankPlan((), device, triton=False, on_cpu=own) for own in cpu.sites]
        for plan in self.plans:  # a replay writes as many rows, whatever was there when it was recorded
            plan.needs = plan.needs._replace(rows=capacity.rows)

    def rewrite(self, batches: Sequence[Sequence[LowRankSegment]], batch_of: Sequence[int]) -> None:
        """Site i gets batches[batch_of[i]], on the current stream and without waiting.

        Raises:
            ValueError: a batch exceeds the capacity; nothing is written then.
        """
        self._tables.rewrite(batches, batch_of)


class _CpuTables:
    """The same as `StaticTables`, as a CPU's kernel reads them."""

    def __init__(self, count: int, capacity: Capacity) -> None:
        from chorus.kernels.native.low_rank import ShortSegments  # numba is not everywhere

        self._capacity, self._of = capacity, ShortSegments.of
        self._width = ShortSegments.most_numbers(capacity.rows, capacity.rank)
        self._memory = torch.zeros(count, self._width, dtype=torch.int32)
        self._short = [ShortSegments(0, own) for own in self._memory]
        self.sites = [StaticSegments(short) for short in self._short]

    def rewrite(self, batches: Sequence[Sequence[LowRankSegment]], batch_of: Sequence[int]) -> None:
        made, hosts = [], []
        for segments in batches:
            used = [s for s in segments if s.acts]
            check_capacity(used, self._capacity)
            made.append(self._of(used))
            hosts.append(self._padded(made[-1].table))
        self._memory.copy_(torch.stack(hosts)[torch.tensor(batch_of, dtype=torch.int64)])
        for short, i in zip(self._short, batch_of, strict=True):
            short.items = made[i].items

    def _padded(self, table: Tensor) -> Tensor:
        return F.pad(table, (0, self._width - len(table)))
