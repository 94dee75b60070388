"""The queue, in order of (priority, has run before, arrival), grouped by adapter so that a missing one is asked once.

    ""      [ seq 3, seq 8 ]              the base model
    ab12…   [ seq 1, seq 4, seq 5 ]       missing
    ff07…   [ seq 2 ]
    aside   [ seq 6, seq 7 ]              out of turn: they wait for pages that somebody else computes

Sorted lists, not heaps: whatever leaves is gone at once, from any position, for two bisections and a memmove of at most
`max_queue` pointers. A step merges the groups' heads, so it costs the number of adapters waited for, not of sequences.
Knows who is next; does not know whether there is room.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Container, Iterator

from chorus.engine.aside import Aside
from chorus.engine.sequence import Sequence

Key = tuple[float, ...]


def rank(seq: Sequence) -> Key:
    """The order of the queue; whoever has run before, and was preempted, comes first among its priority."""
    return seq.priority, not seq.started, seq.ticket


class SortedSequences:
    """Sequences in the order of a unique key that does not change while they are in here."""

    def __init__(self, key: Callable[[Sequence], Key]) -> None:
        self._key = key
        self._items: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._items)

    @property
    def first(self) -> Sequence:
        return self._items[0]

    def add(self, seq: Sequence) -> None:
        insort(self._items, seq, key=self._key)

    def remove(self, seq: Sequence) -> None:
        """Takes a sequence out; RuntimeError if it is not in here."""
        index = bisect_left(self._items, self._key(seq), key=self._key)
        if self._items[index : index + 1] != [seq]:
            raise RuntimeError(f"sequence {seq.request_id} is not in here")
        del self._items[index]


class WaitingGroup:
    """The waiting sequences of one adapter. Each of them counts its own time without it."""

    def __init__(self) -> None:
        self.queue = SortedSequences(rank)
        self.missing = False

    def add(self, seq: Sequence, now: float) -> None:
        seq.adapter_wait_since = now if self.missing else None
        self.queue.add(seq)

    def set_missing(self, missing: bool, now: float) -> None:
        """Says whether the adapter is absent; costs the group's length when that changes, else nothing."""
        if missing == self.missing:
            return
        self.missing = missing
        for seq in self.queue:
            if missing:
                seq.adapter_wait_since = now
            elif seq.adapter_wait_since is not None:
                seq.adapter_wait += now - seq.adapter_wait_since
                seq.adapter_wait_since = None


class WaitingQueue:
    """All waiting sequences."""

    def __init__(self) -> None:
        self._groups: dict[str, WaitingGroup] = {}
        self._aside = Aside()

    @property
    def for_adapter(self) -> int:
        """Sequences whose adapter was missing when they were last in turn."""
        return sum(len(group.queue) for group in self._groups.values() if group.missing)

    @property
    def has_aside(self) -> bool:
        """Whether anybody waits out of turn."""
        return any(True for _ in self._aside)

    def push(self, seq: Sequence, now: float) -> None:
        self._groups.setdefault(_digest(seq), WaitingGroup()).add(seq, now)

    def set_aside(self, seq: Sequence, leader: Sequence, until: int) -> None:
        """Out of turn, until `recall`: it waits until `leader`, which runs, has computed so many tokens."""
        self.remove(seq)
        self._aside.add(seq, leader, until)

    def recall(self, running: Container[Sequence], now: float) -> None:
        """Gives those aside their turn again who have what they waited for, or whose leader runs no more."""
        for seq in self._aside.take_due(running):
            self.push(seq, now)

    def remove(self, seq: Sequence) -> None:
        """Takes a waiting sequence out, wherever it is."""
        if self._aside.remove(seq):
            return
        digest = _digest(seq)
        group = self._groups[digest]
        group.queue.remove(seq)
        if not group.queue:
            del self._groups[digest]

    def of_adapter(self, digest: str) -> list[Sequence]:
        """The waiting sequences of one adapter, in order."""
        group = self._groups.get(digest)
        aside = [seq for seq in self._aside if _digest(seq) == digest]
        return sorted([*(group.queue if group else ()), *aside], key=rank)

    def heads(self) -> list[tuple[Key, WaitingGroup]]:
        """The groups in the order of their first sequences, with its rank."""
        return sorted((rank(group.queue.first), group) for group in self._groups.values())

    def ready(self) -> Iterator[Sequence]:
        """Those that only room keeps waiting: their adapter was there when last in turn, and they are not aside."""
        for group in self._groups.values():
            if not group.missing:
                yield from group.queue

    def check_integrity(self) -> list[Sequence]:
        """Returns all waiting sequences; RuntimeError if one is out of order, in the wrong group, or a group empty."""
        for digest, group in self._groups.items():
            ranks = [rank(seq) for seq in group.queue]
            if not ranks or ranks != sorted(set(ranks)) or any(_digest(seq) != digest for seq in group.queue):
                raise RuntimeError(f"the queue of adapter {digest!r} is broken")
        self._aside.check_integrity()
        return [*self._aside] + [seq for group in self._groups.values() for seq in group.queue]


def _digest(seq: Sequence) -> str:
    return seq.adapter.digest if seq.adapter else ""
