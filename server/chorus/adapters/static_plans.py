"""An adapter pool's plans for a graph: of one size for all batches within a capacity, written anew in place."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from chorus.kernels import LowRankCapacity, LowRankSegment, StaticLowRank

if TYPE_CHECKING:
    from chorus.adapters.pool import AdapterPool, SlotSegment


class StaticPlans:
    """`plans` of the given sites. They say what the batch's adapters add there, after `write` has been told of it."""

    def __init__(
        self, pool: "AdapterPool", names: Sequence[str], capacity: LowRankCapacity, device: torch.device
    ) -> None:
        self._pool = pool
        self._static = StaticLowRank(len(names), capacity, device)
        self.plans = dict(zip(names, self._static.plans, strict=True))
        self._written: tuple[SlotSegment, ...] = ()

    def write(self, segments: "tuple[SlotSegment, ...]") -> None:
        """The next replays are of this batch. Nothing is uploaded while it stays the same: slots are never used twice.

        Raises:
            ValueError: it exceeds the capacity, or an adapter acts at another site; nothing is written then.
        """
        if segments == self._written:
            return
        batches: list[tuple[LowRankSegment, ...]] = [()]
        batch_of = dict.fromkeys(self.plans, 0)
        for layout, names in self._pool.layouts(segments):
            if not batch_of.keys() >= set(names):
                raise ValueError(f"segments: adapters act at {sorted(set(names) - batch_of.keys())}, which has no plan")
            batch_of.update(dict.fromkeys(names, len(batches)))
            batches.append(layout)
        self._static.rewrite(batches, list(batch_of.values()))
        self._written = segments
