"""What a step is made of, and how it is filled."""

from typing import NamedTuple

import msgspec

from chorus.engine.messages import FinishReason
from chorus.engine.sequence import NO_SLOT, Sequence
from chorus.engine.step_cost import StepBound, Work, pairs_of


class Chunk(msgspec.Struct, frozen=True):
    """Tokens `[start, start + count)` of a sequence; `samples` if the logits of the last one are sampled."""

    seq: Sequence
    start: int
    count: int
    samples: bool


class Schedule(NamedTuple):
    """One step: its chunks, decodes first, and who joined or left the running ones on the way.

    `started` holds a sequence of each request that runs for the first time, `expired` the ids of requests.
    """

    chunks: tuple[Chunk, ...]
    preempted: tuple[Sequence, ...]
    started: tuple[Sequence, ...]
    expired: tuple[int, ...]

    @property
    def has_prompts(self) -> bool:
        """Whether somebody starts in it, or goes on with a prompt."""
        return bool(self.started) or any(chunk.count > 1 for chunk in reversed(self.chunks))

    def slots(self) -> set[int]:
        """The adapters' slots that the step's sequences have while they run."""
        return {chunk.seq.slot for chunk in self.chunks} - {NO_SLOT}

    def work(self) -> Work:
        """What the step computes."""
        tokens = pairs = 0
        for chunk in self.chunks:
            tokens += chunk.count
            pairs += pairs_of(chunk.start, chunk.count)
        return Work(tokens, pairs)


class Sampled(NamedTuple):
    """A sequence that got a token, the last of its output, and why it ended with it if it did.

    Who asked for no tokens at all ends with an empty output.
    """

    seq: Sequence
    finish: FinishReason | None


class Plan:
    """The step being laid out, and the tokens that it may still take.

    Where a `bound` is given, prompts take no more than it allows beside decodes; without decodes they take it all.
    """

    def __init__(self, budget: int, bound: StepBound | None = None) -> None:
        self.budget = budget
        self.chunks: list[Chunk] = []
        self.preempted: list[Sequence] = []
        self.started: list[Sequence] = []
        self._bound = bound
        self._work = Work()
        self._decodes = self._prompts = 0

    @property
    def takes_prompts(self) -> bool:
        """Whether a prompt can still go in, if need be in the place of a decode."""
        return self.budget > 0 or not self._prompts

    def compute(self, seq: Sequence) -> None:
        """Gives a sequence as much of what it needs as there is left."""
        remaining = seq.remaining
        is_decode = remaining == 1
        bound = self._bound if self._decodes and not is_decode else None
        count = min(remaining, self.budget)
        if bound:
            count = min(count, bound.chunk(self._work, seq.computed, first=not self._prompts))
        samples = count == remaining and seq.sampling.max_tokens > 0
        self.chunks.append(Chunk(seq, seq.computed, count, samples))
        self.budget -= count
        self._work = self._work.plus(seq.computed, count)
        self._decodes += is_decode
        self._prompts += not is_decode
        if bound and (count < remaining or bound.is_full(self._work)):
            self.budget = 0

    def preempt(self, seq: Sequence) -> None:
        """Marks a sequence as sent back; its token is somebody else's if it was to decode."""
        self.preempted.append(seq)
        for i, chunk in enumerate(self.chunks):
            if chunk.seq is seq:
                del self.chunks[i]
                self.budget += chunk.count
                self._work = self._work.minus(chunk.start, chunk.count)
                self._decodes -= 1
                break
