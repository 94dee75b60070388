"""An adapter pool's plans for a graph: of one size for all batches within a capacity, written anew in place."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from chorus.kernels import (
    LowRankCapacity,
    LowRankPlan,
    LowRankSegment,
    SlotSegment,
    StaticLowRank,
    low_rank_family,
)

if TYPE_CHECKING:
    from chorus.adapters.pool import AdapterPool

    Layouts = list[tuple[tuple[LowRankSegment, ...], list[str]]]


class HeadSites(NamedTuple):
    """Sites that see `rows` rows alone, those whose logits are wanted."""

    names: Collection[str]
    rows: int


class StaticPlans:
    """`plans` of the given sites. They say what the batch's adapters add there, after `write` has been told of it.

    Where some sites are `heads`, these have segments of their own.
    """

    def __init__(
        self,
        pool: "AdapterPool",
        names: Sequence[str],
        capacity: LowRankCapacity,
        device: torch.device,
        heads: HeadSites | None = None,
    ) -> None:
        self._pool = pool
        of_heads = [name for name in names if heads is not None and name in heads.names]
        self._rest = _Part([name for name in names if name not in of_heads], capacity, device)
        self._heads: _Part | None = None
        if heads is not None and of_heads:
            # Mostly a row of each adapter: what samples, not what is sampled from.
            few = replace(capacity, rows=heads.rows, family=low_rank_family(heads.rows, 1))
            self._heads = _Part(of_heads, few, device)
        self.plans: dict[str, LowRankPlan] = self._rest.plans | (self._heads.plans if self._heads else {})
        self._written: tuple[tuple[SlotSegment, ...], ...] | None = ((), ())

    def write(self, segments: tuple[SlotSegment, ...], head_segments: tuple[SlotSegment, ...]) -> None:
        """The next replays are of this batch. Nothing is uploaded while it stays the same: slots are never used twice.

        Raises:
            ValueError: it exceeds the capacity, or an adapter acts at another site. Then no replay is right before the
                next batch is written.
        """
        if (segments, head_segments) == self._written:
            return
        self._written = None
        layouts = self._pool.layouts(segments)
        acted = {name for _, names in layouts for name in names}
        if not self.plans.keys() >= acted:
            raise ValueError(f"segments: adapters act at {sorted(acted - self.plans.keys())}, which has no plan")
        self._rest.write(layouts)
        if self._heads is not None:
            self._heads.write(self._pool.layouts(head_segments, self._heads.plans))
        self._written = segments, head_segments


class _Part:
    """Plans of sites that see the same rows."""

    def __init__(self, names: Sequence[str], capacity: LowRankCapacity, device: torch.device) -> None:
        self._static = StaticLowRank(len(names), capacity, device)
        self.plans = dict(zip(names, self._static.plans, strict=True))

    def write(self, layouts: "Layouts") -> None:
        """Layouts of other sites are passed over."""
        batches: list[tuple[LowRankSegment, ...]] = [()]
        batch_of = dict.fromkeys(self.plans, 0)
        for layout, names in layouts:
            if own := [name for name in names if name in batch_of]:
                batch_of.update(dict.fromkeys(own, len(batches)))
                batches.append(layout)
        self._static.rewrite(batches, list(batch_of.values()))
