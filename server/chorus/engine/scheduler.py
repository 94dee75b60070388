"""Which tokens of which sequences the next step computes: continuous batching, chunked prefill, preemption.

    add ──> waiting ──admit──> running ──advance──> finished
              ^                   │
              └──────preempt──────┘          abort, deadline, discard: out of either, at any time

While it runs, and only then, a sequence holds blocks, one of `max_rows` and a reference to its adapter. At admission it
gets blocks for all tokens it has, so only decodes ever run short. Knows tickets and counters; no tensors, no text.

Why everyone finishes. No sequence may outgrow the pool. Of the running ones the most important decode always gets its
block, or there is none and a prefill, which needs no block, goes on; so each step computes something. The queue is in
order, and whoever lacks only blocks or a row is never overtaken. Whoever lacks its adapter is overtaken; that the
adapter comes is the gate's part: it may refuse references to what is on device until that is free to be replaced.
"""

from bisect import insort
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from chorus.engine.kv_cache import BlockPool
from chorus.engine.messages import AdapterRef, FinishReason
from chorus.engine.sequence import NO_SLOT, Sequence
from chorus.engine.waiting import SortedSequences, WaitingQueue, rank
from chorus.errors import FailedPrecondition, InvalidArgument, ResourceExhausted

QUEUE_RETRY_S = 1.0


class AdapterGate(Protocol):
    """The adapters on the device, as the scheduler sees them."""

    def acquire(self, adapter: AdapterRef) -> int | None:
        """Takes a reference and returns the adapter's slot; None if it is not there yet, which asks for its load.

        Called at most once per step and adapter that is missing; may be followed by `release` at once.
        """

    def release(self, adapter: AdapterRef) -> None:
        """Gives one reference back."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `[start, start + count)` of a sequence; `samples` if the logits of the last one are sampled."""

    seq: Sequence
    start: int
    count: int
    samples: bool


class Schedule(NamedTuple):
    """One step: its chunks, decodes first, and who joined or left the running ones on the way."""

    chunks: tuple[Chunk, ...]
    preempted: tuple[Sequence, ...]
    started: tuple[Sequence, ...]
    expired: tuple[Sequence, ...]


class Sampled(NamedTuple):
    """A sequence that got a token, the last of its output, and why it ended with it if it did."""

    seq: Sequence
    finish: FinishReason | None


class _Plan:
    """The step being laid out, and the tokens that it may still take."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.chunks: list[Chunk] = []
        self.preempted: list[Sequence] = []
        self.started: list[Sequence] = []

    def compute(self, seq: Sequence) -> None:
        count = min(seq.remaining, self.budget)
        self.chunks.append(Chunk(seq, seq.computed, count, samples=count == seq.remaining))
        self.budget -= count


class Scheduler:
    """Decides every step's work. `schedule` and `advance` alternate; everything else may come between any two calls.

    Who runs takes a token in each step, and nobody is admitted to a step whose tokens are taken: so a step always has a
    token for each decode, and at most one prefill is under way at its end.
    """

    def __init__(
        self,
        *,
        pool: BlockPool,
        gate: AdapterGate,
        max_rows: int,
        max_step_tokens: int,
        context_length: int,
        eos_token_ids: frozenset[int],
        max_queue: int,
    ) -> None:
        if min(max_rows, max_step_tokens) < 1:
            raise ValueError(f"a step needs rows and tokens: max_rows={max_rows}, max_step_tokens={max_step_tokens}")
        self._pool = pool
        self._gate = gate
        self._max_rows = max_rows
        self._max_step_tokens = max_step_tokens
        self._context_length = context_length
        self._eos_token_ids = eos_token_ids
        self._max_queue = max_queue
        self._tickets = 0
        self._sequences: dict[int, Sequence] = {}
        self._running: dict[int, Sequence] = {}  # in the order of admission
        self._waiting = WaitingQueue()
        self._deadlines = SortedSequences(lambda seq: (seq.deadline or 0.0, seq.ticket))

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences in the queue, those that wait for their adapter among them."""
        return len(self._sequences) - len(self._running)

    @property
    def waiting_for_adapter(self) -> int:
        return self._waiting.for_adapter

    def add(self, seq: Sequence, now: float) -> None:
        """Queues a new sequence.

        Raises:
            InvalidArgument: the prompt leaves no room in the context for a new token.
            FailedPrecondition: the prompt and a new token do not fit into the whole KV cache.
            ResourceExhausted: the queue is full.
        """
        if seq.request_id in self._sequences:
            raise ValueError(f"request {seq.request_id} is here already")
        prompt, longest = len(seq.prompt), min(self._context_length, self._pool.capacity)
        if prompt >= longest:
            message = f"the prompt has {prompt} tokens, the limit is {longest - 1}"
            if prompt >= self._context_length:
                raise InvalidArgument(message, field="prompt")
            raise FailedPrecondition(f"{message}: the KV cache is no larger", reason="KV_CACHE_TOO_SMALL")
        if self.waiting >= self._max_queue:
            message = f"{self._max_queue} requests are waiting already"
            raise ResourceExhausted(message, reason="QUEUE_FULL", retry_after_s=QUEUE_RETRY_S)
        seq.max_length = min(prompt + seq.sampling.max_tokens, longest)
        seq.ticket = self._tickets = self._tickets + 1
        self._sequences[seq.request_id] = seq
        self._waiting.push(seq, now)
        if seq.deadline is not None:
            self._deadlines.add(seq)

    def abort(self, request_id: int) -> Sequence | None:
        """Removes a sequence wherever it is; None if it is not here (any more)."""
        seq = self._sequences.get(request_id)
        if seq is not None:
            self._remove(seq)
        return seq

    def discard(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        """Removes those of the given sequences that are still here, and returns them: for a step that failed."""
        here = [seq for seq in sequences if self._sequences.get(seq.request_id) is seq]
        for seq in here:
            self._remove(seq)
        return here

    def discard_all(self) -> list[Sequence]:
        """Removes every sequence, running or not, and returns them."""
        return self.discard(list(self._sequences.values()))

    def fail_adapter(self, digest: str) -> list[Sequence]:
        """Removes all waiting sequences of an adapter that can not be loaded, and returns them in order."""
        return self.discard(self._waiting.of_adapter(digest))

    def schedule(self, now: float) -> Schedule:
        """Lays out the next step: decodes, then prefills under way, then whom the queue can send."""
        expired = self._expire(now)
        plan = _Plan(self._max_step_tokens)
        # Most important first, most recently admitted last.
        running = sorted(self._running.values(), key=lambda seq: seq.priority)
        prefills = [seq for seq in running if seq.remaining > 1]
        self._plan_decodes(running, plan, now)
        for seq in prefills:
            if seq.request_id in self._running:
                plan.compute(seq)
        if not plan.preempted:
            self._admit(plan, now)
        return Schedule(tuple(plan.chunks), tuple(plan.preempted), tuple(plan.started), tuple(expired))

    def advance(self, schedule: Schedule, tokens: Mapping[int, int]) -> list[Sampled]:
        """Books a step that has run: `tokens` maps the request id of each chunk that samples to its new token.

        Chunks of sequences that were removed meanwhile are passed over. Finished sequences are removed.
        """
        sampled = []
        for chunk in schedule.chunks:
            seq = chunk.seq
            if self._running.get(seq.request_id) is not seq:
                continue
            seq.computed += chunk.count
            if not chunk.samples:
                continue
            seq.output.append(tokens[seq.request_id])
            finish = seq.finish_reason(self._eos_token_ids)
            if finish:
                self._remove(seq)
            sampled.append(Sampled(seq, finish))
        return sampled

    def check_integrity(self) -> None:
        """Raises RuntimeError, naming what is wrong, when an invariant that does not need the gate is broken."""
        running, waiting = self._running.values(), self._waiting.check_integrity()
        if sorted(s.request_id for s in (*running, *waiting)) != sorted(self._sequences):
            raise RuntimeError("a sequence is lost, or both running and waiting")
        if len(running) > self._max_rows:
            raise RuntimeError(f"{len(running)} sequences run in {self._max_rows} rows")
        for seq in waiting:
            if seq.blocks or seq.computed or seq.slot != NO_SLOT:
                raise RuntimeError(f"waiting sequence {seq.request_id} holds something")
        for seq in running:
            if not 0 <= seq.computed < seq.length < seq.max_length:
                raise RuntimeError(f"running sequence {seq.request_id} has nothing to do")
        if set(self._deadlines) != {seq for seq in self._sequences.values() if seq.deadline is not None}:
            raise RuntimeError("deadlines are kept of other sequences than there are")
        self._pool.check_integrity(running)

    def _plan_decodes(self, running: list[Sequence], plan: _Plan, now: float) -> None:
        """Gives each decode its token, and a block where it needs one, at the cost of the end of `running`.

        Whoever stands behind the sequence in turn has not been planned in this step, so it can still be preempted. The
        last one has nobody to take from: it keeps what it has and sits the step out.
        """
        turn = 0
        while turn < len(running):
            seq = running[turn]
            turn += 1
            if seq.remaining > 1:
                continue
            while not self._pool.allocate_for(seq, seq.length):
                if running[-1] is seq:
                    break
                plan.preempted.append(self._preempt(running.pop(), now))
            else:
                plan.compute(seq)

    def _admit(self, plan: _Plan, now: float) -> None:
        """Starts waiting sequences in order, passing over those whose adapter is missing, until one does not fit."""
        heads = self._waiting.heads()
        turn = 0
        while turn < len(heads) and plan.budget and len(self._running) < self._max_rows:
            group = heads[turn][1]
            turn += 1
            seq = group.queue.first
            slot = self._gate.acquire(seq.adapter) if seq.adapter else NO_SLOT
            group.set_missing(slot is None, now)
            if slot is None:
                continue
            if not self._take_blocks(seq):
                self._release(seq)
                break
            self._waiting.remove(seq)
            self._running[seq.request_id] = seq
            seq.slot = slot
            if not seq.started:
                seq.started = True
                plan.started.append(seq)
            plan.compute(seq)
            if group.queue:
                insort(heads, (rank(group.queue.first), group), lo=turn)

    def _take_blocks(self, seq: Sequence) -> bool:
        """Gives a waiting sequence blocks for all it has, if every running one can still grow by a block after that.

        Without that margin whoever comes last is preempted soon, and its prefill was for nothing: 300 requests of
        16-512 prompt and 16-256 new tokens in 512 blocks of 16 recompute 26 % of their tokens; with it 3 %, in 2 % more
        steps.
        """
        needed = self._pool.blocks_for(seq.length) + len(self._running)
        return needed <= self._pool.free_count and self._pool.allocate_for(seq, seq.length)

    def _preempt(self, seq: Sequence, now: float) -> Sequence:
        """Back to the front of its priority's queue: its tokens stay, what was computed of them is lost."""
        self._stop(seq)
        seq.computed = 0
        self._waiting.push(seq, now)
        return seq

    def _remove(self, seq: Sequence) -> None:
        """Out of everything, from whatever state."""
        if seq.request_id in self._running:
            self._stop(seq)
        else:
            self._waiting.remove(seq)
        del self._sequences[seq.request_id]
        if seq.deadline is not None:
            self._deadlines.remove(seq)

    def _stop(self, seq: Sequence) -> None:
        """Gives back all that a running sequence holds."""
        del self._running[seq.request_id]
        self._pool.free(seq)
        self._release(seq)
        seq.slot = NO_SLOT

    def _release(self, seq: Sequence) -> None:
        if seq.adapter:
            self._gate.release(seq.adapter)

    def _expire(self, now: float) -> list[Sequence]:
        expired = []
        while self._deadlines and (seq := self._deadlines.first).deadline is not None and seq.deadline <= now:
            self._remove(seq)
            expired.append(seq)
        return expired
