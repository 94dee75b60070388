"""Which tokens of which sequences the next step computes: continuous batching, chunked prefill, preemption.

    add ──> waiting ──admit──> running ──advance──> finished
              ^                   │
              └──────preempt──────┘          abort, deadline, discard: out of either, at any time

While it runs, and only then, a sequence holds blocks, one of `max_rows` and a reference to its adapter. At admission it
gets blocks for all tokens it has, so only decodes ever run short. Knows tickets and counters; no tensors, no text.

Full pages can be found by what they hold (`page_keys`) as soon as a step that computed them has gone well, and until
somebody needs the room. Whoever starts shares the first pages of what it has, as far as they are found: a prompt's that
was here before, a sibling's, or its own from before it was preempted. It always computes its last token, and those
whose rows it has to tell of. Of those that begin alike the first to run computes what they share; the others are set
aside until it has (`admission`).

Some bases rotate positions otherwise once a sequence is longer than `short_length` tokens. A sequence that grows past
it goes back to the queue and is computed anew; pages are found only on the same side of it.

Why everyone finishes. No sequence may outgrow the pool. Of the running ones the most important decode always gets its
block, or there is none and a prefill, which needs no block, goes on; so each step computes something, and nobody is
preempted but for somebody more important, who starts at once: whoever is first of all that are here is never, and ends.
The queue is in order, and whoever lacks only blocks or a row is never overtaken. Whoever lacks its adapter is
overtaken; that the adapter comes is the gate's part: it may refuse references to what is on device until that is free
to be replaced. Whoever is aside is overtaken too, but only while one runs that computes pages for it and goes on before
any that overtake: it ends that, or is preempted or removed, and then the others have their old turn again.
"""

from collections.abc import Iterable, Mapping

from chorus.engine.admission import Admission
from chorus.engine.intake import Limits, can_be_met, check_deadline, tokens_to_compute
from chorus.engine.kv_cache import BlockPool
from chorus.engine.messages import FinishReason
from chorus.engine.page_keys import PageKeys
from chorus.engine.requests import Requests
from chorus.engine.running import AdapterGate, Running
from chorus.engine.schedule import Chunk, Plan, Sampled, Schedule
from chorus.engine.sequence import Key, Sequence
from chorus.engine.step_cost import StepBound, StepCost


class Scheduler:
    """Decides every step's work. `schedule` and `advance` alternate; everything else may come between any two calls.

    `ahead` lays out one more before the last one has been advanced; then they are advanced in their order.

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
        self._max_step_tokens = max_step_tokens
        self._limits = Limits(context_length, pool.capacity, max_queue)
        self._eos_token_ids = eos_token_ids
        self._short_length = short_length
        self._keys = PageKeys(pool.block_size, across_requests=prefix_cache, short_length=short_length)
        self.cost = StepCost()
        self._bound = StepBound(self.cost, target_step_s, pool.block_size) if target_step_s is not None else None
        self._now = 0.0
        self._requests = Requests()
        self._running = Running(pool, gate, min(max_rows, max_step_tokens))
        self._admission = Admission(pool, self._keys, self._requests, self._running, self.cost)
        self._waiting = self._admission.waiting

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
        running = self._running.by_importance()
        prefills = [seq for seq in running if seq.remaining > 1]
        self._plan_decodes(running, plan)
        self._admission.begin(now)
        for seq in prefills:
            self._admission.admit(plan, before=seq.priority)
            if plan.budget and seq in self._running:
                plan.compute(seq)
        self._admission.admit(plan)
        return Schedule(tuple(plan.chunks), tuple(plan.preempted), tuple(plan.started), tuple(expired))

    def ahead(self, schedule: Schedule, now: float) -> Schedule | None:
        """The step after one that has not been advanced; None where more than counts decides what is in it.

        Counts are enough while all who run draw a token in that step and nobody can join, must leave or lacks a block.
        Then they all decode, but for those who will have all their tokens. Who draws a token that ends it has a chunk
        here for nothing: `advance` passes it over.
        """
        drawing = {chunk.seq for chunk in schedule.chunks if chunk.samples and chunk.start == chunk.seq.computed}
        running = self._running.by_importance()
        decodes = [seq for seq in running if seq.length + 1 < seq.max_length]
        if (
            not decodes
            or not drawing.issuperset(running)
            or not self._admission.is_closed(leaving=len(running) - len(decodes))
            or any(seq.length == self._short_length for seq in decodes)
            or self._requests.expired(now)
            or not self._pool.allocate_for_all([(seq, seq.length + 1) for seq in decodes])
        ):
            return None
        return Schedule(tuple(Chunk(seq, seq.length, 1, samples=True) for seq in decodes), (), (), ())

    def still_running(self, schedule: Schedule) -> list[Chunk]:
        """A step's chunks, without those of sequences that have gone since."""
        return [chunk for chunk in schedule.chunks if chunk.seq in self._running]

    def advance(self, schedule: Schedule, tokens: Mapping[Key, int]) -> list[Sampled]:
        """Books a step that has run: `tokens` maps the key of each chunk's sequence that samples to its new token.

        Chunks of sequences that were removed meanwhile are passed over. Finished sequences are removed.
        """
        sampled = []
        for chunk in schedule.chunks:
            seq = chunk.seq
            if seq not in self._running:
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
                self._admission.send_back(seq, self._now)
            sampled.append(Sampled(seq, finish))
        return sampled

    def check_integrity(self) -> None:
        """Raises RuntimeError, naming what is wrong, when an invariant that does not need the gate is broken."""
        waiting = self._admission.check_integrity()
        if sorted(s.key for s in (*self._running, *waiting)) != sorted(s.key for s in self._requests):
            raise RuntimeError("a sequence is lost, or both running and waiting")
        self._requests.check_integrity()
        self._running.check_integrity()

    def _check_deadline(self, first: Sequence, deadline: float, now: float) -> None:
        """Raises if its first token would come too late, behind prompts under way and those with an earlier turn.

        The queue is only looked at where all prompts that are here would take longer.
        """
        if can_be_met(deadline - now, self.cost, self._requests.prompt_tokens + first.length):
            return
        prefills = (seq for seq in self._running if seq.remaining > 1)
        ahead = [seq for seq in (*prefills, *self._waiting.ready()) if seq.priority <= first.priority]
        tokens = [tokens_to_compute(seqs, self._keys, self._pool) for seqs in ([first], [*ahead, first])]
        check_deadline(deadline - now, self.cost, ahead=tokens[1] - tokens[0], own=tokens[0])

    def _plan_decodes(self, running: list[Sequence], plan: Plan) -> None:
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
                plan.preempt(last := running.pop())
                self._admission.send_back(last, self._now)
            else:
                plan.compute(seq)

    def _keep_pages(self, chunk: Chunk) -> None:
        """Makes the pages known that a chunk, which has been computed, has filled."""
        seq, size = chunk.seq, self._pool.block_size
        filled = range(chunk.start // size, seq.computed // size)
        if filled:
            keys = self._keys.of(seq, filled.stop)
            for page in filled:
                self._pool.keep(seq.blocks[page], keys[page])

    def _remove(self, seq: Sequence) -> None:
        """Out of everything, from whatever state."""
        if seq in self._running:
            self._running.stop(seq)
        else:
            self._waiting.remove(seq)
        self._requests.remove(seq)
