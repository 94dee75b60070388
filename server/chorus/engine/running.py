"""Who runs, and what they hold meanwhile: blocks, a row, a reference to their adapter. At rest they hold nothing.

Knows how to begin and how to stop; does not know who is next.
"""

from collections.abc import Iterator
from operator import attrgetter
from typing import Protocol

from chorus.engine.kv_cache import BlockPool
from chorus.engine.messages import AdapterRef
from chorus.engine.sequence import NO_SLOT, Sequence


class AdapterGate(Protocol):
    """The adapters on the device, as the scheduler sees them."""

    def acquire(self, adapter: AdapterRef) -> int | None:
        """Takes a reference and returns the adapter's slot; None if it is not there yet, which asks for its load.

        Called at most once per step and adapter that is missing; may be followed by `release` at once.
        """

    def release(self, adapter: AdapterRef) -> None:
        """Gives one reference back."""


class Running:
    """The running sequences, in the order of admission."""

    def __init__(self, pool: BlockPool, gate: AdapterGate, rows: int) -> None:
        self._pool = pool
        self._gate = gate
        self._rows = rows
        self._sequences: dict[Sequence, None] = {}  # a set that keeps its order

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def __contains__(self, seq: object) -> bool:
        return seq in self._sequences

    def has_row(self, leaving: int = 0) -> bool:
        """Whether one more can run once so many have stopped, as far as rows are concerned."""
        return len(self._sequences) - leaving < self._rows

    def by_importance(self) -> list[Sequence]:
        """The most important first, of equally important ones the most recently admitted last."""
        return sorted(self._sequences, key=attrgetter("priority"))

    def less_important(self, priority: int) -> list[Sequence]:
        """Those of a larger priority; the one to be preempted first is the last."""
        return [seq for seq in self.by_importance() if seq.priority > priority]

    def acquire_adapter(self, seq: Sequence) -> int | None:
        """Its adapter's slot, with a reference that `start` keeps or `release_adapter` gives back; None if missing."""
        return self._gate.acquire(seq.adapter) if seq.adapter else NO_SLOT

    def release_adapter(self, seq: Sequence) -> None:
        if seq.adapter:
            self._gate.release(seq.adapter)

    def start(self, seq: Sequence, slot: int) -> None:
        """Takes in a sequence that has its blocks and the reference to its adapter."""
        self._sequences[seq] = None
        seq.slot = slot

    def stop(self, seq: Sequence) -> None:
        """Gives back all that a running sequence holds."""
        del self._sequences[seq]
        self._pool.free(seq)
        self.release_adapter(seq)
        seq.slot, seq.computed = NO_SLOT, 0

    def check_integrity(self) -> None:
        """Raises RuntimeError when there are too many, or one has nothing to do, or blocks do not add up."""
        if len(self) > self._rows:
            raise RuntimeError(f"{len(self)} sequences run in {self._rows} rows")
        for seq in self:
            if not 0 <= seq.computed < seq.length or seq.length >= seq.max_length + (seq.sampling.max_tokens == 0):
                raise RuntimeError(f"running sequence {seq.key} has nothing to do")
        self._pool.check_integrity(self)
