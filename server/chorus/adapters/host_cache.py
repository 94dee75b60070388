"""Adapters in host memory, which go to the device without being read and checked again.

    disk ──(loader thread: 3 ms of one core)──> host copy ──(step thread: 0.5 ms)──> device
                                                    └── stays here, within a budget

The least recently used copy leaves first. A version on the device keeps its copy here as long as there is room, so that
its place there can be given away at any time.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

from chorus.adapters.kinds import LoweredAdapter


class HostCopy(NamedTuple):
    """An adapter as its loader gave it, what it takes, and where it was read."""

    adapter: LoweredAdapter
    bytes: int
    path: str


class HostCache:
    """Copies by digest, of `budget` bytes together at most."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._copies: OrderedDict[str, HostCopy] = OrderedDict()
        self.bytes_used = 0
        self.evictions = 0
        """Copies that had to make room."""

    def __len__(self) -> int:
        return len(self._copies)

    def __contains__(self, digest: object) -> bool:
        return digest in self._copies

    def items(self) -> Iterator[tuple[str, HostCopy]]:
        yield from self._copies.items()

    def find(self, digest: str) -> HostCopy | None:
        """The version's copy, which counts as a use."""
        copy = self._copies.get(digest)
        if copy is not None:
            self._copies.move_to_end(digest)
        return copy

    def keep(self, digest: str, copy: HostCopy) -> None:
        """Takes a copy in, in the place of those used least recently; one larger than the budget is not kept."""
        if digest in self._copies or copy.bytes > self._budget:
            return
        while self.bytes_used + copy.bytes > self._budget:
            self.drop(next(iter(self._copies)))
            self.evictions += 1
        self._copies[digest] = copy
        self.bytes_used += copy.bytes

    def drop(self, digest: str) -> None:
        """Forgets a version's copy, if there is one."""
        if (copy := self._copies.pop(digest, None)) is not None:
            self.bytes_used -= copy.bytes

    def check_integrity(self) -> None:
        """Raises AssertionError when bytes are miscounted, or more than granted."""
        assert self.bytes_used == sum(copy.bytes for copy in self._copies.values()), "host bytes are miscounted"
        assert self.bytes_used <= self._budget, "more host memory than granted"
