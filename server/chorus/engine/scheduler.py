"""Which tokens of which sequences the next step computes: continuous batching, chunked prefill, preemption.

    add ──> waiting ──admit──> running ──advance──> finished
              ^                   │
              └──────preempt──────┘          abort, deadline, discard: out of either, at any time

While it runs, and only then, a sequence holds blocks, one of `max_rows` and a reference to its adapter. At admission it
gets blocks for all tokens it has, so only decodes ever run short. Knows tickets and counters; no tensors, no text.

Full pages can be found by what they hold (`page_keys`) as soon as a step that computed them has gone well, and until
somebody needs the room. Whoever starts shares the first pages of what it has, as far as they are found: a prompt's that
was here before, a sibling's, or its own from before it was preempted. It always computes its last token, and those
whose rows it has to tell of. Of the outputs of one request the first to run computes their prompt; its siblings are
set aside until it has.

Some bases rotate positions otherwise once a sequence is longer than `short_length` tokens. A sequence that grows past
it goes back to the queue and is computed anew; pages are found only on the same side of it.

Why everyone finishes. No sequence may outgrow the pool. Of the running ones the most important decode always gets its
block, or there is none and a prefill, which needs no block, goes on; so each step computes something. The queue is in
order, and whoever lacks only blocks or a row is never overtaken. Whoever lacks its adapter is overtaken; that the
adapter comes is the gate's part: it may refuse references to what is on device until that is free to be replaced.
Whoever is aside is overtaken too, but only while a sibling runs that still computes the prompt, which goes on in each
step: it ends that, or is preempted or removed, and then the others have their old turn again.
"""

from bisect import insort
from collections.abc import Iterable, Mapping
from math import inf
from typing import Protocol

from chorus.engine.intake import Limits, can_be_met, check_deadline, tokens_to_compute
from chorus.engine.kv_cache import BlockPool
from chorus.engine.messages import AdapterRef, FinishReason
from chorus.engine.page_keys import PageKeys
from chorus.engine.requests import Requests
from chorus.engine.schedule import Chunk, Plan, Sampled, Schedule
from chorus.engine.sequence import NO_SLOT, Key, Sequence
from chorus.engine.step_cost import StepBound, StepCost
from chorus.engine.waiting import Key as Rank
from chorus.engine.waiting import WaitingGroup, WaitingQueue, rank


class AdapterGate(Protocol):
    """The adapters on the device, as the scheduler sees them."""

    def acquire(self, adapter: AdapterRef) -> int | None:
        """Takes a reference and returns the adapter's slot; None if it is not there yet, which asks for its load.

        Called at most once per step and adapter that is missing; may be followed by `release` at once.
        """

    def release(self, adapter: AdapterRef) -> None:
        """Gives one reference back."""


class Scheduler:
    """Decides every step's work. `schedule` and `advance` alternate; everything else may come between any two calls.

    No more run than a step has tokens, so there is one for each decode. Nobody is admitted to a step whose tokens are
    taken: so of each priority at most one prefill is under way at its end. A more important one goes before it.
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
        short_length: int | None = None,
        prefix_cache: bool = True,
        target_step_s: float | None = None,
    ) -> None:
        if min(max_rows, max_step_tokens) < 1:
            raise ValueError(f"a step needs rows and tokens: max_rows={max_rows}, max_step_tokens={max_step_tokens}")
        self._pool = pool
        self._gate = gate
        self._max_rows = min(max_rows, max_step_tokens)
        self._max_step_tokens = max_step_tokens
        self._limits = Limits(context_length, pool.capacity, max_queue)
        self._eos_token_ids = eos_token_ids
        self._short_length = short_length
        self._keys = PageKeys(pool.block_size, across_requests=prefix_cache, short_length=short_length)
        self.cost = StepCost()
        self._bound = StepBound(self.cost, target_step_s, pool.block_size) if target_step_s is not None else None
        self._now = 0.0
        self._requests = Requests()
        self._running: dict[Key, Sequence] = {}  # in the order of admission
        self._waiting = WaitingQueue()

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences in the queue, those that wait for their adapter or a sibling among them."""
        return len(self._requests) - len(self._running)

    @property
    def waiting_for_adapter(self) -> int:
        return self._waiting.for_adapter

    def add(self, outputs: list[Sequence], now: float) -> None:
        """Queues all outputs of a new request, or none of them.

        Raises:
            InvalidArgument: the prompt leaves no room in the context for what is asked.
            FailedPrecondition: the whole KV cache is too small for the prompt, or the whole queue for the outputs.
            ResourceExhausted: the queue has too little room left, or too many are ahead for the deadline.
            DeadlineExceeded: the prompt alone takes longer than the deadline allows.
        """
        first = outputs[0]
        self._limits.check_prompt(len(first.prompt), first.sampling.max_tokens)
        self._limits.check_room(self.waiting, len(outputs))
        if first.deadline is not None and first.deadline > now:
            self._check_deadline(first, first.deadline, now)
        self._requests.add(outputs)
        for seq in outputs:
            seq.max_length = min(len(seq.prompt) + seq.sampling.max_tokens, self._limits.longest)
            self._waiting.push(seq, now)

    def abort(self, request_id: int, index: int | None = None) -> list[Sequence]:
        """Removes a request, or one of its outputs, wherever it is, and returns what was still here."""
        gone = [seq for seq in self._requests.outputs(request_id) if index is None or seq.index == index]
        for seq in gone:
            self._remove(seq)
        return gone

    def discard(self, request_ids: Iterable[int]) -> list[int]:
        """Removes those of the given requests that are still here, and returns their ids, each once."""
        return [request_id for request_id in request_ids if self.abort(request_id)]

    def fail(self, request_ids: Iterable[int]) -> list[int]:
        """Removes those of the given requests that are still here, and returns their ids, each once.

        Something went wrong in computing them, so nobody finds their pages any more: what is in there is not trusted.
        """
        request_ids = list(request_ids)
        for request_id in request_ids:
            for seq in self._requests.outputs(request_id):
                self._pool.forget(seq)
        return self.discard(request_ids)

    def fail_adapter(self, digest: str) -> list[int]:
        """Removes all requests that wait for an adapter that can not be loaded, and returns their ids in order."""
        return self.discard([seq.request_id for seq in self._waiting.of_adapter(digest)])

    def schedule(self, now: float) -> Schedule:
        """Lays out the next step: decodes; then by priority prefills under way, and whom the queue can send."""
        self._now = now
        expired = self.discard(self._requests.expired(now))
        plan = Plan(self._max_step_tokens, self._bound)
        # Most important first, most recently admitted last.
        running = sorted(self._running.values(), key=lambda seq: seq.priority)
        prefills = [seq for seq in running if seq.remaining > 1]
        self._plan_decodes(running, plan, now)
        heads = [] if plan.preempted else self._heads(now)
        for seq in prefills:
            self._admit(plan, heads, now, before=seq.priority)
            if plan.budget and seq.key in self._running:
                plan.compute(seq)
        self._admit(plan, heads, now)
        return Schedule(tuple(plan.chunks), tuple(plan.preempted), tuple(plan.started), tuple(expired))

    def advance(self, schedule: Schedule, tokens: Mapping[Key, int]) -> list[Sampled]:
        """Books a step that has run: `tokens` maps the key of each chunk's sequence that samples to its new token.

        Chunks of sequences that were removed meanwhile are passed over. Finished sequences are removed.
        """
        sampled = []
        for chunk in schedule.chunks:
            seq = chunk.seq
            if self._running.get(seq.key) is not seq:
                continue
            seq.computed += chunk.count
            self._keep_pages(chunk)
            if seq.remaining:
                continue
            if chunk.samples:
                seq.output.append(tokens[seq.key])
                finish = seq.finish_reason(self._eos_token_ids)
            else:
                finish = FinishReason.LENGTH
            if finish:
                self._remove(seq)
            elif seq.length - 1 == self._short_length:
                seq.page_keys.clear()
                self._preempt(seq, self._now)
            sampled.append(Sampled(seq, finish))
        return sampled

    def check_integrity(self) -> None:
        """Raises RuntimeError, naming what is wrong, when an invariant that does not need the gate is broken."""
        running, waiting = self._running.values(), self._waiting.check_integrity()
        if sorted(s.key for s in (*running, *waiting)) != sorted(s.key for s in self._requests):
            raise RuntimeError("a sequence is lost, or both running and waiting")
        if len(running) > self._max_rows:
            raise RuntimeError(f"{len(running)} sequences run in {self._max_rows} rows")
        for seq in waiting:
            if seq.blocks or seq.computed or seq.slot != NO_SLOT:
                raise RuntimeError(f"waiting sequence {seq.key} holds something")
        for seq in running:
            if not 0 <= seq.computed < seq.length or seq.length >= seq.max_length + (seq.sampling.max_tokens == 0):
                raise RuntimeError(f"running sequence {seq.key} has nothing to do")
        self._requests.check_integrity()
        self._pool.check_integrity(running)

    def _check_deadline(self, first: Sequence, deadline: float, now: float) -> None:
        """Raises if its first token would come too late, behind prompts under way and those with an earlier turn.

        The queue is only looked at where all prompts that are here would take longer.
        """
        if can_be_met(deadline - now, self.cost, self._requests.prompt_tokens + first.length):
            return
        prefills = (seq for seq in self._running.values() if seq.remaining > 1)
        ahead = [seq for seq in (*prefills, *self._waiting.ready()) if seq.priority <= first.priority]
        tokens = [tokens_to_compute(seqs, self._keys, self._pool) for seqs in ([first], [*ahead, first])]
        check_deadline(deadline - now, self.cost, ahead=tokens[1] - tokens[0], own=tokens[0])

    def _plan_decodes(self, running: list[Sequence], plan: Plan, now: float) -> None:
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

    def _heads(self, now: float) -> list[tuple[Rank, WaitingGroup]]:
        """The queue's groups in order, after those aside are back whose sibling does not compute any more."""
        for seq in self._waiting.aside():
            if not self._sibling_computes(seq):
                self._waiting.recall(seq.request_id, now)
        return self._waiting.heads()

    def _admit(self, plan: Plan, heads: list[tuple[Rank, WaitingGroup]], now: float, before: float = inf) -> None:
        """Starts waiting sequences of a priority before the given one in order, until one does not fit.

        Passes over those whose adapter is missing, and sets aside those whose sibling computes their prompt. Takes from
        `heads` whom it has looked at, all of them if one does not fit.
        """
        while heads and heads[0][0][0] < before and plan.budget and len(self._running) < self._max_rows:
            group = heads.pop(0)[1]
            seq = group.queue.first
            slot = self._gate.acquire(seq.adapter) if seq.adapter else NO_SLOT
            group.set_missing(slot is None, now)
            if slot is None:
                continue
            if self._sibling_computes(seq):
                self._release(seq)
                self._waiting.set_aside(seq)
            elif self._take_blocks(seq):
                self._start(seq, slot, plan)
            else:
                self._release(seq)
                heads.clear()
                break
            if group.queue:
                insort(heads, (rank(group.queue.first), group))

    def _sibling_computes(self, seq: Sequence) -> bool:
        """Whether an output of the same request runs that has not computed all the pages yet that they can share."""
        shared = (len(seq.prompt) - 1) // self._pool.block_size * self._pool.block_size
        return any(
            sibling.computed < shared and self._keys.is_long(sibling) == self._keys.is_long(seq)
            for sibling in self._requests.outputs(seq.request_id)
            if sibling.key in self._running
        )

    def _take_blocks(self, seq: Sequence) -> bool:
        """Gives a waiting sequence blocks for all it has, if every running one can still grow by a block after that.

        Without that margin whoever comes last is preempted soon, and its prefill was for nothing: 300 requests of
        16-512 prompt and 16-256 new tokens in 512 blocks of 16 recompute 26 % of their tokens; with it 3 %, in 2 % more
        steps.
        """
        found = self._pool.find(self._keys.of(seq, seq.first_needed // self._pool.block_size))
        if self._pool.room_after(found, seq.length) < len(self._running):
            return False
        self._pool.share(seq, found)
        return self._pool.allocate_for(seq, seq.length)

    def _keep_pages(self, chunk: Chunk) -> None:
        """Makes the pages known that a chunk, which has been computed, has filled."""
        seq, size = chunk.seq, self._pool.block_size
        filled = range(chunk.start // size, seq.computed // size)
        if filled:
            keys = self._keys.of(seq, filled.stop)
            for page in filled:
                self._pool.keep(seq.blocks[page], keys[page])

    def _start(self, seq: Sequence, slot: int, plan: Plan) -> None:
        """From the queue into the step that is laid out."""
        self._waiting.remove(seq)
        self._running[seq.key] = seq
        seq.slot = slot
        if self._requests.start(seq):
            plan.started.append(seq)
        plan.compute(seq)

    def _preempt(self, seq: Sequence, now: float) -> Sequence:
        """Back to the front of its priority's queue: its tokens stay, what was computed of them is lost."""
        self._stop(seq)
        seq.computed = 0
        self._waiting.push(seq, now)
        return seq

    def _remove(self, seq: Sequence) -> None:
        """Out of everything, from whatever state."""
        if seq.key in self._running:
            self._stop(seq)
        else:
            self._waiting.remove(seq)
        self._requests.remove(seq)

    def _stop(self, seq: Sequence) -> None:
        """Gives back all that a running sequence holds."""
        del self._running[seq.key]
        self._pool.free(seq)
        self._release(seq)
        seq.slot = NO_SLOT

    def _release(self, seq: Sequence) -> None:
        if seq.adapter:
            self._gate.release(seq.adapter)
