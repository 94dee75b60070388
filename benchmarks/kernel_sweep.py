"""`low_rank` over Llama-3-8B's shapes, case by case, for GPUs: rows, adapters, ranks; each case beside its floor.

A pass calls a contestant on several copies of the inputs, past the L2 cache; its time is divided by their number.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from kernel_cases import (
    PASS_BYTES,
    Group,
    LowRankCase,
    Work,
    layer_groups,
    low_rank_case,
    low_rank_contestants,
    static_contestants,
)
from kernel_timing import Ceilings, seconds

LOOPED_ADAPTERS = 64  # above, the loop over adapters is thousands of launches and nothing else
MIXED = (8, 16, 32, 128)
DECODES = ((1, 1), (16, 16), (64, 64), (256, 256), (64, 4), (64, 8), (256, 16))
# Rows of a graph's decodes and their adapters: where one family of static plans or another is predicted to win.
STATIC = ((64, 16), (64, 1), (128, 16), (256, 32), (256, 1))
PREFILLS = ((2048, 1), (2048, 8), (8192, 8))
HIDDEN, KV, FFN = 4096, 1024, 14336

Peer = Callable[[str, Any], Work | None]


class SweepCase(NamedTuple):
    """Deltas of `rows` rows at the sites of `groups`, an adapter for each of `ranks`; with `static` plans too."""

    shape: str
    groups: tuple[Group, ...]
    rows: int
    ranks: tuple[int, ...]
    static: bool = False

    @property
    def name(self) -> str:
        ranks = f"r{self.ranks[0]}" if len(set(self.ranks)) == 1 else "mixed"
        return f"{self.shape} rows {self.rows} adapters {len(self.ranks)} {ranks}"

    @property
    def bytes(self) -> int:
        """Adapters' weights once, each group's x read once, y read and written; two bytes an element."""
        pools = sum(self.ranks) * self._width
        inputs = self.rows * sum(k for k, _ in self.groups)
        outputs = 2 * self.rows * sum(sum(ns) for _, ns in self.groups)
        return 2 * (pools + inputs + outputs)

    @property
    def copies(self) -> int:
        """Inputs of a pass, so that it reads past the cache."""
        return max(PASS_BYTES // self.bytes, 1)

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds that no implementation is under: bytes, FLOPs, one launch for what reads the same x."""
        flops = 2 * self._width * sum(self.ranks) * (self.rows // len(self.ranks))
        return ceilings.floor(self.bytes, flops, len(self.groups))

    @property
    def _width(self) -> int:
        return sum(k + n for k, ns in self.groups for n in ns)


def llama_cases() -> Iterator[SweepCase]:
    """Llama-3-8B: a layer's seven linears; then q or o, k or v, gate or up, down, each alone.

    Decodes all distinct and of few adapters, prefill of few adapters, other ranks and mixed ones.
    """
    layer = layer_groups(HIDDEN, KV, FFN)
    for rows in (1, 16, 64):
        yield SweepCase("layer", layer, rows, (16,) * rows)
    for rows, adapters in STATIC:
        yield SweepCase("layer", layer, rows, (16,) * adapters, static=True)
    for k, n in ((HIDDEN, HIDDEN), (HIDDEN, KV), (HIDDEN, FFN), (FFN, HIDDEN)):
        for rows, adapters in (*DECODES, *PREFILLS):
            yield single(k, n, rows, (16,) * adapters)
    for rank in (8, 32, 64, 128):
        yield single(HIDDEN, HIDDEN, 64, (rank,) * 64)
    yield single(HIDDEN, HIDDEN, 64, MIXED * 16)
    yield single(HIDDEN, HIDDEN, 2048, MIXED * 2)


def single(k: int, n: int, rows: int, ranks: tuple[int, ...]) -> SweepCase:
    """One linear, [K, N]."""
    return SweepCase(f"{k}x{n}", ((k, (n,)),), rows, ranks)


def sweep(
    cases: Iterable[SweepCase], ceilings: Ceilings, peers: dict[str, Peer], device: str
) -> Iterator[dict[str, Any]]:
    """A row for each case: seconds a call by contestant, the floor, floor over time of ours."""
    for case in cases:
        inputs = low_rank_case(device, case.groups * case.copies, case.rows, case.ranks)
        contestants = _contestants(inputs, case, peers)
        taken = {name: seconds(work, case.rows, device) / case.copies for name, work in contestants.items()}
        floor = case.floor(ceilings)
        yield {
            "op": "low_rank",
            "case": case.name,
            "shape": case.shape,
            "rows": case.rows,
            "adapters": len(case.ranks),
            "ranks": sorted(set(case.ranks)),
            "seconds": taken,
            "floor": floor,
            "floor_over_time": floor / taken["chorus"],
        }


def _contestants(inputs: LowRankCase, case: SweepCase, peers: dict[str, Peer]) -> dict[str, Work]:
    contestants = low_rank_contestants(inputs) | (static_contestants(inputs) if case.static else {})
    if len(case.ranks) > LOOPED_ADAPTERS:
        del contestants["loop over adapters"]
    for name, peer in peers.items():
        if (work := peer("low_rank", inputs)) is not None:
            contestants[name] = work
    return contestants
