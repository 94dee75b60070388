"""Adapters in host memory, which go to the device without being read and checked again.

    disk ──(loader thread: 1 to 2 ms of one core)──> host copy ──(step thread: 0.2 ms)──> device
                                                         └── stays here, within a budget

The copy used least recently leaves first. A version on the device has its copy here too, as long as there is room; it
counts as used when the version is asked for and is not on the device, when it comes there and when it leaves it.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

from chorus.adapters.lowered import LoweredAdapter


class HostCopy(NamedTuple):
    """An adapter as its loader gave it, where it was read, and what residency tells of it."""

    adapter: LoweredAdapter
    path: str
    rank_rows: int
    bytes: int
    """Of its factors."""
    held: int
    """Bytes of host memory, what Python and torch need for each factor among them."""


class HostCache:
    """Copies by digest, which hold `budget` bytes together at most."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._copies: OrderedDict[str, HostCopy] = OrderedDict()
        self.held = 0
        self.evictions = 0
        """Copies that had to make room."""

    def __len__(self) -> int:
        return len(self._copies)

    def __contains__(self, digest: object) -> bool:
        return digest in self._copies

    def items(self) -> Iterator[tuple[str, HostCopy]]:
        yield from self._copies.items()

    def get(self, digest: str) -> HostCopy | None:
        return self._copies.get(digest)

    def touch(self, digest: str) -> None:
        """The version's copy, if there is one, has been in use."""
        if digest in self._copies:
            self._copies.move_to_end(digest)

    def keep(self, digest: str, copy: HostCopy) -> None:
        """Takes a copy in, in the place of those used least recently; one larger than the budget is not kept."""
        if copy.held > self._budget:
            return
        self.drop(digest)
        while self.held + copy.held > self._budget:
            self.drop(next(iter(self._copies)))
            self.evictions += 1
        self._copies[digest] = copy
        self.held += copy.held

    def drop(self, digest: str) -> None:
        """Forgets a version's copy, if there is one."""
        if (copy := self._copies.pop(digest, None)) is not None:
            self.held -= copy.held

    def check_integrity(self) -> None:
        """Raises AssertionError when bytes are miscounted, or more than granted."""
        assert self.held == sum(copy.held for copy in self._copies.values()), "host bytes are miscounted"
        assert self.held <= self._budget, "more host memory than granted"
