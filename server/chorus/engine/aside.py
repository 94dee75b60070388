"""Sequences out of turn: each waits for pages that a running one computes, up to so many of that one's tokens.

    behind seq 3    [ (64, seq 7), (96, seq 9) ]      seq 7 has its turn again once 64 tokens of seq 3 are computed
    behind seq 5    [ (32, seq 6) ]

They have it as well when the one before them stops. A step looks at the first of each line only. Knows who waits for
whom; does not know why.
"""

from bisect import insort
from collections.abc import Container, Iterator

from chorus.engine.sequence import Sequence

Place = tuple[int, int, Sequence]
"""Tokens to be computed, the ticket of who waits for them, and who that is."""


class Aside:
    """The lines behind running sequences."""

    def __init__(self) -> None:
        self._lines: dict[Sequence, list[Place]] = {}
        self._leaders: dict[Sequence, Sequence] = {}

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._leaders)

    def add(self, seq: Sequence, leader: Sequence, until: int) -> None:
        self._leaders[seq] = leader
        insort(self._lines.setdefault(leader, []), (until, seq.ticket, seq))

    def remove(self, seq: Sequence) -> bool:
        """Takes a sequence out; False if it is not in here."""
        leader = self._leaders.pop(seq, None)
        if leader is None:
            return False
        line = self._lines[leader]
        line[:] = [place for place in line if place[2] is not seq]
        if not line:
            del self._lines[leader]
        return True

    def take_due(self, running: Container[Sequence]) -> list[Sequence]:
        """Takes out those whose pages are computed, or whose leader runs no more."""
        due = []
        for leader, line in list(self._lines.items()):
            reached = leader.computed if leader in running else float("inf")
            while line and line[0][0] <= reached:
                due.append(line.pop(0)[2])
                del self._leaders[due[-1]]
            if not line:
                del self._lines[leader]
        return due

    def check_integrity(self) -> None:
        """Raises RuntimeError when a line is out of order or empty, or somebody is in another line than it thinks."""
        found = {place[2]: leader for leader, line in self._lines.items() for place in line}
        if found != self._leaders or not all(line == sorted(line) and line for line in self._lines.values()):
            raise RuntimeError("somebody aside is in no line, or in a wrong one")
