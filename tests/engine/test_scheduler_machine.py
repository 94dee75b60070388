"""Arbitrary histories of the scheduler against what must hold in all of them.

A plain model beside it knows each output's tokens and how many are computed, and what every place of the KV cache was
computed from; the gate knows who holds references. After every step and every rule nothing is leaked, overtaken,
recomputed from the wrong place or forgotten, and no page is written by two; when arrivals stop, everyone ends with
exactly the tokens that were asked for.
"""

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from chorus.engine.kv_cache import BlockPool
from chorus.engine.messages import AdapterRef, FinishReason, Sampling, Submit, TokenLogprob
from chorus.engine.schedule import Chunk, Schedule
from chorus.engine.scheduler import Scheduler
from chorus.engine.sequence import Key, Sequence, outputs_of
from chorus.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, ResourceExhausted
from support.gates import LoadingGate
from support.kv_contents import KVContents

EOS = 0
STOP_TOKENS = frozenset({1})
TENANTS = ["", "t", "u"]
ADAPTERS = [AdapterRef(digest, f"/{digest}") for digest in "abcd"]


@dataclass
class Expected:
    """What is known of an output from outside."""

    seq: Sequence
    limit: int
    output: list[int]
    computed: int = 0

    @property
    def total(self) -> int:
        return len(self.seq.prompt) + len(self.output)


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        blocks=st.integers(2, 10) | st.integers(8, 20),
        block_size=st.integers(1, 3),
        rows=st.sampled_from([4, 3, 5, 2, 1]),
        budget=st.integers(4, 12) | st.integers(1, 4),
        context=st.sampled_from([40, 40, 20, 4]),
        queue=st.integers(6, 16) | st.integers(1, 6),
        slots=st.integers(1, 3),
        short=st.none() | st.integers(1, 20),
        cache=st.sampled_from([True, True, False]),
        bound=st.none() | st.integers(2, 10),
    )
    def build(
        self,
        blocks: int,
        block_size: int,
        rows: int,
        budget: int,
        context: int,
        queue: int,
        slots: int,
        short: int | None,
        cache: bool,
        bound: int | None,
    ) -> None:
        self.pool, self.gate = BlockPool(blocks, block_size), LoadingGate(slots)
        self.contents, self.short = KVContents(block_size, short), short
        self.rows, self.budget, self.queue = min(rows, budget), budget, queue
        self.longest = min(context, self.pool.capacity)
        self.scheduler = Scheduler(
            pool=self.pool,
            gate=self.gate,
            max_rows=rows,
            max_step_tokens=budget,
            context_length=context,
            eos_token_ids=frozenset({EOS}),
            max_queue=queue,
            short_length=short,
            prefix_cache=cache,
            target_step_s=bound,
        )
        self.now, self.arrivals = 0.0, 0
        self.live: dict[Key, Expected] = {}
        self.started: set[int] = set()

    @rule(
        prompt=st.integers(1, 12) | st.integers(1, 3),
        sampling=st.builds(
            Sampling,
            max_tokens=st.integers(1, 40) | st.just(40) | st.integers(0, 1),
            min_tokens=st.integers(0, 4),
            ignore_eos=st.booleans(),
            stop_token_ids=st.sampled_from([frozenset(), STOP_TOKENS]),
            prompt_logprobs=st.sampled_from([None, None, 0]),
        ),
        adapter=st.none() | st.none() | st.sampled_from(ADAPTERS),
        priority=st.integers(0, 2),
        patience=st.none() | st.none() | st.integers(0, 40),
        copies=st.integers(1, 4),
        n=st.just(1) | st.integers(1, 5),
        text=st.none() | st.integers(0, 2),
        tenant=st.sampled_from(TENANTS),
    )
    def add(
        self,
        prompt: int,
        sampling: Sampling,
        adapter: AdapterRef | None,
        priority: int,
        patience: int | None,
        copies: int,
        n: int,
        text: int | None,
        tenant: str,
    ) -> None:
        deadline = None if patience is None else self.now + patience
        for _ in range(copies):
            self._add(prompt, sampling, adapter, priority, deadline, n, text, tenant)

    @rule(
        prompt=st.integers(4, 12),
        new=st.integers(4, 40),
        reads=st.sampled_from([None, None, 0]),
        adapter=st.none() | st.sampled_from(ADAPTERS[:2]),
        n=st.integers(2, 5),
    )
    def add_several_outputs(self, prompt: int, new: int, reads: int | None, adapter: AdapterRef | None, n: int) -> None:
        """Adds what shares pages for a long time."""
        self._add(prompt, Sampling(new, ignore_eos=True, prompt_logprobs=reads), adapter, 1, None, n)

    def _add(
        self,
        prompt: int,
        sampling: Sampling,
        adapter: AdapterRef | None,
        priority: int,
        deadline: float | None,
        n: int,
        text: int | None = None,
        tenant: str = "",
    ) -> None:
        """Adds a request; those of the same `text` have as much of their prompts in common as the shorter one has."""
        self.arrivals += 1
        tokens = tuple(100 * (self.arrivals + 100 if text is None else text) + i for i in range(prompt))
        submit = Submit(self.arrivals, tokens, sampling, adapter, priority, deadline, n, tenant)
        outputs = outputs_of(submit, self.now)
        too_long = prompt + min(sampling.max_tokens, 1) > self.longest
        room = self.queue - self.scheduler.waiting
        try:
            self.scheduler.add(outputs, self.now)
        except InvalidArgument:
            assert too_long
        except FailedPrecondition:
            assert too_long or n > self.queue
        except DeadlineExceeded:
            assert deadline is not None
        except ResourceExhausted:
            assert room < n <= self.queue or deadline is not None
        else:
            assert not too_long
            assert n <= room
            limit = min(sampling.max_tokens, self.longest - prompt)
            self.live |= {seq.key: Expected(seq, limit, []) for seq in outputs}

    @rule(count=st.integers(1, 8), token=st.integers(2, 9))
    def run(self, count: int, token: int) -> None:
        """Runs some steps in peace."""
        for _ in range(count):
            self._advance(self._schedule(), [token] * 5)
            self.nothing_is_leaked_or_lost()

    @rule(data=st.data(), tokens=st.lists(st.integers(0, 40), min_size=5, max_size=5), passed=st.integers(0, 3))
    def step(self, data: st.DataObject, tokens: list[int], passed: int) -> None:
        """Runs a step; now and then someone aborts while it runs, or a part of it fails."""
        self.now += passed
        schedule = self._schedule()
        accident = data.draw(st.sampled_from(["none", "none", "abort", "failure"]))
        if accident == "failure" and schedule.chunks:
            guilty = data.draw(
                st.sets(st.sampled_from(sorted({c.seq.request_id for c in schedule.chunks})), min_size=1)
            )
            for chunk in schedule.chunks:
                self.contents.write(chunk, spoiled=True)
            self._distrust(guilty)
            assert self.scheduler.fail(sorted(guilty)) == sorted(guilty)
            self._forget(guilty)
        if accident == "abort" and self.live:
            self.abort(data)
        self._advance(schedule, tokens)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id, index = data.draw(st.sampled_from(sorted(self.live)))
        gone = {(request_id, index)}
        if data.draw(st.booleans()):
            assert self.scheduler.abort(request_id, index) == [self.live[request_id, index].seq]
        else:
            gone = {key for key in self.live if key[0] == request_id}
            assert {seq.key for seq in self.scheduler.abort(request_id)} == gone
        for key in gone:
            del self.live[key]
        assert self.scheduler.abort(request_id, index) == []

    @rule()
    def adapter_arrives(self) -> None:
        self.gate.arrive()

    @precondition(lambda self: self.gate.wanted)
    @rule(data=st.data())
    def adapter_fails(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(self.gate.wanted))
        self.gate.wanted.remove(digest)
        adapter = AdapterRef(digest, f"/{digest}")
        waiting = {e.seq.request_id for e in self.live.values() if not e.seq.blocks and e.seq.adapter == adapter}
        failed = self.scheduler.fail_adapter(digest)
        assert sorted(failed) == sorted(waiting)
        self._forget(waiting)

    @invariant()
    def nothing_is_leaked_or_lost(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_integrity()
        running = [e.seq for e in self.live.values() if e.seq.blocks]
        held = Counter(seq.adapter.digest for seq in running if seq.adapter)
        assert held == +self.gate.refs
        assert self.scheduler.running == len(running)
        assert self.scheduler.running + self.scheduler.waiting == len(self.live)
        assert self.scheduler.waiting_for_adapter <= self.scheduler.waiting
        assert self.pool.free_count == self.pool.num_blocks - len({block for seq in running for block in seq.blocks})

    def teardown(self) -> None:
        """Arrivals stop, adapters come, nobody aborts: everyone ends, with all its tokens, in bounded time."""
        if not hasattr(self, "scheduler"):
            return
        # One at a time, each may be computed anew once for every token of the others, and wait for all the adapters.
        tokens = sum(e.seq.max_length for e in self.live.values())
        bound = (len(self.live) + 1) * (tokens + 4 * len(ADAPTERS))
        for _ in range(bound):
            if not self.live:
                break
            self.gate.arrive()
            self._advance(self._schedule(), [7] * 5)
            self.nothing_is_leaked_or_lost()
        assert not self.live
        assert self.pool.usage == 0
        assert not +self.gate.refs

    def _distrust(self, request_ids: set[int]) -> None:
        """Pages that the guilty alone have hold what nobody may ever read."""
        owners = Counter(block for e in self.live.values() for block in set(e.seq.blocks))
        for expected in self.live.values():
            if expected.seq.request_id in request_ids:
                for block in expected.seq.blocks:
                    if owners[block] == 1:
                        self.contents.spoil(block)

    def _forget(self, request_ids: set[int]) -> None:
        self.live = {key: e for key, e in self.live.items() if key[0] not in request_ids}

    def _schedule(self) -> Schedule:
        resident = {digest for digest in self.gate.slots if digest != self.gate.yielding}
        ran = {e.seq for e in self.live.values() if e.seq.blocks}
        schedule = self.scheduler.schedule(self.now)
        for request_id in schedule.expired:
            deadlines = {e.seq.deadline for key, e in self.live.items() if key[0] == request_id}
            assert all(deadline is not None and deadline <= self.now for deadline in deadlines)
        self._forget(set(schedule.expired))
        for seq in schedule.preempted:
            self.live[seq.key].computed = 0
            assert seq.output == self.live[seq.key].output
        for chunk in schedule.chunks:
            if chunk.seq not in ran:
                self._check_admission(chunk, ran)
        self._check_chunks(schedule, ran)
        self._check_order(schedule, resident)
        return schedule

    def _check_admission(self, chunk: Chunk, ran: set[Sequence]) -> None:
        """Who joins starts behind full pages, and computes at least a token and every row that it has to tell of.

        If an output of its request runs, on its side, it starts behind their prompt's pages at least.
        """
        expected, size = self.live[chunk.seq.key], self.pool.block_size
        pages = (len(chunk.seq.prompt) - 1) // size
        siblings = [
            e
            for key, e in self.live.items()
            if key[0] == chunk.seq.request_id and e.seq in ran and self._is_long(e) == self._is_long(expected)
        ]
        assert chunk.start % size == 0
        assert chunk.start < expected.total
        reads = chunk.seq.sampling.prompt_logprobs is not None and not expected.output
        is_unlike_others = chunk.seq.prompt[0] >= 100 * 100
        if pages and siblings and not reads and is_unlike_others:
            assert chunk.start >= pages * size
            assert any(
                e.computed >= pages * size and e.seq.blocks[:pages] == chunk.seq.blocks[:pages] for e in siblings
            )
        expected.computed = chunk.start

    def _check_chunks(self, schedule: Schedule, ran: set[Sequence]) -> None:
        assert sum(chunk.count for chunk in schedule.chunks) <= self.budget
        assert len(schedule.chunks) <= self.rows
        assert len({chunk.seq.key for chunk in schedule.chunks}) == len(schedule.chunks)
        self._check_idle(schedule, ran)
        assert {chunk.seq for chunk in schedule.chunks}.isdisjoint(schedule.preempted)
        owners = Counter(block for e in self.live.values() for block in e.seq.blocks)
        for chunk in schedule.chunks:
            expected, end = self.live[chunk.seq.key], chunk.start + chunk.count
            assert chunk.start == expected.computed
            assert 1 <= chunk.count <= expected.total - chunk.start
            assert chunk.samples == (end == expected.total and expected.limit > 0)
            written = chunk.seq.blocks[chunk.start // self.pool.block_size : self.pool.blocks_for(end)]
            assert [owners[block] for block in written] == [1] * len(written)
            assert len(chunk.seq.blocks) >= self.pool.blocks_for(end)
            assert chunk.seq.deadline is None or chunk.seq.deadline > self.now
            self.contents.check(chunk)

    def _check_idle(self, schedule: Schedule, ran: set[Sequence]) -> None:
        """Who runs is in the step, but for prefills behind more important ones, and one decode that has no block."""
        at_work = {chunk.seq for chunk in schedule.chunks}
        idle = [e for e in self.live.values() if e.seq.blocks and e.seq not in at_work]
        decodes = [e for e in idle if e.total - e.computed == 1]
        assert len(decodes) == 0 or (len(decodes) == 1 and len(schedule.chunks) > 0 and self.pool.free_count == 0)
        for e in idle:
            first = [c.seq.priority for c in schedule.chunks if c.seq.remaining > 1 or c.seq not in ran]
            assert e in decodes or min(first) < e.seq.priority

    def _check_order(self, schedule: Schedule, resident: set[str]) -> None:
        """No request that could run is overtaken, and none starts twice."""
        for seq in schedule.started:
            assert seq.request_id not in self.started
            self.started.add(seq.request_id)
        able = [
            e.seq
            for e in self.live.values()
            if e.seq.request_id not in self.started and (e.seq.adapter is None or e.seq.adapter.digest in resident)
        ]
        for started in schedule.started:
            assert all((seq.priority, seq.ticket) > (started.priority, started.ticket) for seq in able)

    def _advance(self, schedule: Schedule, tokens: list[int]) -> None:
        work = schedule.work()
        self.scheduler.cost.observe(work, 1.0 + work.tokens)
        here = [chunk for chunk in schedule.chunks if chunk.seq.key in self.live]
        drawn = dict(zip([chunk.seq.key for chunk in here if chunk.samples], tokens, strict=False))
        for chunk in here:
            self.live[chunk.seq.key].computed += chunk.count
            self.contents.write(chunk)
            self._tell(chunk)
        done = [chunk.seq.key for chunk in here if self.live[chunk.seq.key].computed == self.live[chunk.seq.key].total]
        results = self.scheduler.advance(schedule, drawn)
        assert [seq.key for seq, _ in results] == done
        for seq, finish in results:
            expected = self.live[seq.key]
            if seq.key in drawn:
                expected.output.append(drawn[seq.key])
            assert seq.output == expected.output
            assert finish == self._finish(expected)
            if finish:
                del self.live[seq.key]
            elif expected.total - 1 == self.short:
                expected.computed = 0
                assert not seq.blocks

    def _tell(self, chunk: Chunk) -> None:
        """The prompt's rows that are to be told of come in order, each once, none passed over."""
        seq = chunk.seq
        if told := seq.untold_rows(chunk.start, chunk.count):
            assert told.start == len(seq.prompt_logprobs)
            seq.prompt_logprobs += [TokenLogprob(0.0)] * len(told)
        if seq.sampling.prompt_logprobs is not None and seq.computed + chunk.count == seq.length:
            assert len(seq.prompt_logprobs) == len(seq.prompt) - 1

    def _is_long(self, expected: Expected) -> bool:
        return self.short is not None and expected.total > self.short

    def _finish(self, expected: Expected) -> FinishReason | None:
        sampling, output = expected.seq.sampling, expected.output
        stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else {EOS})
        if output and output[-1] in stops and len(output) > sampling.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(output) == expected.limit else None


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("adapters", [2, 3])
def test_adapters_take_turns_on_one_slot_under_a_steady_stream(adapters: int) -> None:
    """The first adapter's requests never stop coming; the others get the slot all the same."""
    gate, pool = LoadingGate(slots=1), BlockPool(64, 4)
    eos: frozenset[int] = frozenset()
    scheduler = Scheduler(
        pool=pool, gate=gate, max_rows=4, max_step_tokens=16, context_length=64, eos_token_ids=eos, max_queue=1000
    )
    served: Counter[str] = Counter()
    for turn in range(300):
        adapter = ADAPTERS[0 if turn % 10 else turn // 10 % adapters]
        scheduler.add([Sequence(turn, (5,), Sampling(max_tokens=4), adapter)], float(turn))
        gate.arrive()
        schedule = scheduler.schedule(float(turn))
        for seq, finish in scheduler.advance(schedule, {chunk.seq.key: 7 for chunk in schedule.chunks}):
            assert seq.adapter
            served[seq.adapter.digest] += finish is not None
    assert all(served[adapter.digest] >= 5 for adapter in ADAPTERS[:adapters])
