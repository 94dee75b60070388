"""Adapters on a device, as a scheduler sees them."""

from collections import Counter

from chorus.engine.messages import AdapterRef


class Gate:
    """Adapters that are on the device, by slot; counts references and what was asked for."""

    def __init__(self, *resident: AdapterRef) -> None:
        self.slots = {adapter.digest: slot for slot, adapter in enumerate(resident)}
        self.refs: Counter[str] = Counter()
        self.asked: list[str] = []

    def acquire(self, adapter: AdapterRef) -> int | None:
        slot = self.slots.get(adapter.digest)
        if slot is None:
            self.asked.append(adapter.digest)
        else:
            self.refs[adapter.digest] += 1
        return slot

    def release(self, adapter: AdapterRef) -> None:
        self.refs[adapter.digest] -= 1


class LoadingGate:
    """A device with few slots. A missing adapter is loaded when `arrive` says so and a slot is free or can be freed.

    Who waits for room too long gets it: `arrive` marks a slot as yielding, which then takes no new references.
    """

    def __init__(self, slots: int) -> None:
        self.free = list(range(slots))
        self.slots: dict[str, int] = {}
        self.refs: Counter[str] = Counter()
        self.wanted: list[str] = []
        self.yielding: str | None = None

    def acquire(self, adapter: AdapterRef) -> int | None:
        if adapter.digest in self.slots and adapter.digest != self.yielding:
            self.refs[adapter.digest] += 1
            return self.slots[adapter.digest]
        if adapter.digest not in self.wanted:
            self.wanted.append(adapter.digest)
        return None

    def release(self, adapter: AdapterRef) -> None:
        self.refs[adapter.digest] -= 1
        assert self.refs[adapter.digest] >= 0, "released more often than acquired"

    def arrive(self) -> None:
        """Serves the one that has waited longest."""
        digest = next((digest for digest in self.wanted if digest not in self.slots), None)
        if digest is None:
            self.yielding, self.wanted = None, []
        elif self.free or self._evict():
            self.slots[digest] = self.free.pop()
            self.wanted.remove(digest)

    def _evict(self) -> bool:
        idle = [digest for digest in self.slots if self.refs[digest] == 0]
        if not idle:
            self.yielding = self.yielding or next(iter(self.slots))
            return False
        victim = self.yielding if self.yielding in idle else idle[0]
        if victim == self.yielding:
            self.yielding = None
        self.free.append(self.slots.pop(victim))
        return True
