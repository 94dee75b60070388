"""The sequences that are not over: by request, whose outputs stand and fall together, and by deadline.

    request 7   [ output 0, output 1, output 2 ]     has started
    request 8   [ output 0 ]

Knows who belongs together; does not know who runs and who waits.
"""

from collections.abc import Iterator

from chorus.engine.sequence import Key, Sequence
from chorus.engine.waiting import SortedSequences


class Requests:
    """All sequences, in the order of arrival."""

    def __init__(self) -> None:
        self._sequences: dict[Key, Sequence] = {}
        self._outputs: dict[int, list[Sequence]] = {}
        self._started: set[int] = set()
        self._deadlines = SortedSequences(lambda seq: (seq.deadline or 0.0, seq.ticket))
        self._tickets = 0
        self.prompt_tokens = 0
        """Of all their prompts together, computed or not."""

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences.values())

    def outputs(self, request_id: int) -> list[Sequence]:
        """Those of a request's outputs that are not over, by index; empty if it is not here (any more)."""
        return list(self._outputs.get(request_id, ()))

    def add(self, outputs: list[Sequence]) -> None:
        """Takes all outputs of one request in and gives them their tickets; ValueError if the request is here."""
        for seq in outputs:
            if seq.request_id in self._outputs:
                raise ValueError(f"request {seq.request_id} is here already")
        for seq in outputs:
            seq.ticket = self._tickets = self._tickets + 1
            self._sequences[seq.key] = seq
            self.prompt_tokens += len(seq.prompt)
            self._outputs.setdefault(seq.request_id, []).append(seq)
            if seq.deadline is not None:
                self._deadlines.add(seq)

    def remove(self, seq: Sequence) -> None:
        del self._sequences[seq.key]
        self.prompt_tokens -= len(seq.prompt)
        siblings = self._outputs[seq.request_id]
        siblings.remove(seq)
        if not siblings:
            del self._outputs[seq.request_id]
            self._started.discard(seq.request_id)
        if seq.deadline is not None:
            self._deadlines.remove(seq)

    def start(self, seq: Sequence) -> bool:
        """Marks that a sequence runs; True if it is the first of its request that ever does."""
        seq.started = True
        first = seq.request_id not in self._started
        self._started.add(seq.request_id)
        return first

    def expired(self, now: float) -> list[int]:
        """The requests whose deadline has passed."""
        passed: dict[int, None] = {}
        for seq in self._deadlines:
            if seq.deadline is None or seq.deadline > now:
                break
            passed[seq.request_id] = None
        return list(passed)

    def check_integrity(self) -> None:
        """Raises RuntimeError when the tables do not tell the same."""
        listed = [seq for outputs in self._outputs.values() for seq in outputs]
        if {seq.key: seq for seq in listed} != self._sequences or len(listed) != len(self._sequences):
            raise RuntimeError("a sequence is lost, or in two requests")
        if self.prompt_tokens != sum(len(seq.prompt) for seq in listed):
            raise RuntimeError(f"{self.prompt_tokens} tokens of prompts are counted, and there are others")
        if not self._started <= self._outputs.keys() or any(
            seq.started and seq.request_id not in self._started for seq in listed
        ):
            raise RuntimeError("a request has started without its outputs, or they without it")
        if set(self._deadlines) != {seq for seq in listed if seq.deadline is not None}:
            raise RuntimeError("deadlines are kept of other sequences than there are")
