"""Arbitrary histories of the scheduler against what must hold in all of them.

A plain model beside it knows each request's tokens and how many are computed; the gate knows who holds references.
After every step and every rule nothing is leaked, shared, overtaken, recomputed from the wrong place or forgotten; when
arrivals stop, everyone ends with exactly the tokens that were asked for.
"""

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from chorus.engine.kv_cache import BlockPool
from chorus.engine.messages import AdapterRef, FinishReason, Sampling
from chorus.engine.scheduler import Schedule, Scheduler
from chorus.engine.sequence import Sequence
from chorus.errors import FailedPrecondition, InvalidArgument, ResourceExhausted

EOS = 0
STOP_TOKENS = frozenset({1})
ADAPTERS = [AdapterRef(digest, f"/{digest}") for digest in "abcd"]


class Gate:
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


@dataclass
class Expected:
    """What is known of a request from outside."""

    seq: Sequence
    limit: int
    output: list[int]
    computed: int = 0
    started: bool = False


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        blocks=st.integers(2, 10),
        block_size=st.integers(1, 3),
        rows=st.sampled_from([4, 3, 5, 2, 1]),
        budget=st.integers(4, 12) | st.integers(1, 4),
        context=st.sampled_from([40, 20, 4]),
        queue=st.integers(4, 12) | st.integers(1, 4),
        slots=st.integers(1, 3),
    )
    def build(self, blocks: int, block_size: int, rows: int, budget: int, context: int, queue: int, slots: int) -> None:
        self.pool, self.gate = BlockPool(blocks, block_size), Gate(slots)
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
        )
        self.now, self.arrivals = 0.0, 0
        self.live: dict[int, Expected] = {}

    @rule(
        prompt=st.integers(1, 12) | st.integers(1, 3),
        sampling=st.builds(
            Sampling,
            max_tokens=st.integers(1, 40) | st.just(40),
            min_tokens=st.integers(0, 4),
            ignore_eos=st.booleans(),
            stop_token_ids=st.sampled_from([frozenset(), STOP_TOKENS]),
        ),
        adapter=st.none() | st.none() | st.sampled_from(ADAPTERS),
        priority=st.integers(0, 2),
        patience=st.none() | st.none() | st.integers(0, 40),
        copies=st.integers(1, 4),
    )
    def add(
        self,
        prompt: int,
        sampling: Sampling,
        adapter: AdapterRef | None,
        priority: int,
        patience: int | None,
        copies: int,
    ) -> None:
        for _ in range(copies):
            self._add(prompt, sampling, adapter, priority, patience)

    def _add(
        self, prompt: int, sampling: Sampling, adapter: AdapterRef | None, priority: int, patience: int | None
    ) -> None:
        self.arrivals += 1
        deadline = None if patience is None else self.now + patience
        seq = Sequence(self.arrivals, tuple(range(prompt)), sampling, adapter, priority, deadline, self.now)
        full = self.scheduler.waiting >= self.queue
        try:
            self.scheduler.add(seq, self.now)
        except (InvalidArgument, FailedPrecondition):
            assert prompt + 1 > self.longest
        except ResourceExhausted:
            assert full
        else:
            assert not full
            assert prompt + 1 <= self.longest
            self.live[seq.request_id] = Expected(seq, min(sampling.max_tokens, self.longest - prompt), [])

    @rule(count=st.integers(1, 8), token=st.integers(2, 9))
    def run(self, count: int, token: int) -> None:
        """Runs some steps in peace."""
        for _ in range(count):
            self._advance(self._schedule(), [token] * 5)
            self.nothing_is_leaked_or_lost()

    @rule(data=st.data(), tokens=st.lists(st.integers(0, 40), min_size=5, max_size=5), passed=st.integers(0, 3))
    def step(self, data: st.DataObject, tokens: list[int], passed: int) -> None:
        """Runs a step; now and then someone aborts while it runs, or it fails."""
        self.now += passed
        schedule = self._schedule()
        accident = data.draw(st.sampled_from(["none", "none", "abort", "failure"]))
        if accident == "failure":
            lost = self.scheduler.discard([chunk.seq for chunk in schedule.chunks])
            assert len(lost) == len(schedule.chunks)
            for seq in lost:
                del self.live[seq.request_id]
            return
        if accident == "abort" and self.live:
            self.abort(data)
        self._advance(schedule, tokens)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.live)))
        assert self.scheduler.abort(request_id) is self.live.pop(request_id).seq
        assert self.scheduler.abort(request_id) is None

    @rule()
    def adapter_arrives(self) -> None:
        self.gate.arrive()

    @precondition(lambda self: self.gate.wanted)
    @rule(data=st.data())
    def adapter_fails(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(self.gate.wanted))
        self.gate.wanted.remove(digest)
        waiting = [
            e.seq for e in self.live.values() if e.seq.slot < 0 and e.seq.adapter == AdapterRef(digest, f"/{digest}")
        ]
        failed = self.scheduler.fail_adapter(digest)
        assert set(failed) == set(waiting)
        for seq in failed:
            del self.live[seq.request_id]

    @invariant()
    def nothing_is_leaked_or_lost(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_integrity()
        running = [e.seq for e in self.live.values() if e.seq.slot >= 0 and e.seq.adapter]
        held = Counter(seq.adapter.digest for seq in running if seq.adapter)
        assert held == +self.gate.refs
        assert self.scheduler.running + self.scheduler.waiting == len(self.live)
        assert self.scheduler.waiting_for_adapter <= self.scheduler.waiting

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

    def _schedule(self) -> Schedule:
        resident = {digest for digest in self.gate.slots if digest != self.gate.yielding}
        schedule = self.scheduler.schedule(self.now)
        for seq in schedule.expired:
            assert seq.deadline is not None
            assert seq.deadline <= self.now
            del self.live[seq.request_id]
        for seq in schedule.preempted:
            self.live[seq.request_id].computed = 0
            assert seq.output == self.live[seq.request_id].output
        self._check_chunks(schedule)
        self._check_order(schedule, resident)
        return schedule

    def _check_chunks(self, schedule: Schedule) -> None:
        assert sum(chunk.count for chunk in schedule.chunks) <= self.budget
        assert len(schedule.chunks) <= self.rows
        assert len({chunk.seq.request_id for chunk in schedule.chunks}) == len(schedule.chunks)
        idle = self.scheduler.running - len(schedule.chunks)
        assert idle == 0 or (idle == 1 and len(schedule.chunks) > 0 and self.pool.free_count == 0)
        assert {chunk.seq for chunk in schedule.chunks}.isdisjoint(schedule.preempted)
        for chunk in schedule.chunks:
            expected = self.live[chunk.seq.request_id]
            total = len(chunk.seq.prompt) + len(expected.output)
            assert chunk.start == expected.computed
            assert 1 <= chunk.count <= total - chunk.start
            assert chunk.samples == (chunk.start + chunk.count == total)
            assert len(chunk.seq.blocks) * self.pool.block_size >= chunk.start + chunk.count
            assert chunk.seq.deadline is None or chunk.seq.deadline > self.now

    def _check_order(self, schedule: Schedule, resident: set[str]) -> None:
        """Nobody who could run is overtaken, and nobody starts twice."""
        for seq in schedule.started:
            assert not self.live[seq.request_id].started
            self.live[seq.request_id].started = True
        able = [
            e.seq
            for e in self.live.values()
            if not e.started and (e.seq.adapter is None or e.seq.adapter.digest in resident)
        ]
        for started in schedule.started:
            assert all((seq.priority, seq.ticket) > (started.priority, started.ticket) for seq in able)

    def _advance(self, schedule: Schedule, tokens: list[int]) -> None:
        here = [chunk for chunk in schedule.chunks if chunk.seq.request_id in self.live]
        sampling = [chunk.seq.request_id for chunk in here if chunk.samples]
        drawn = dict(zip(sampling, tokens, strict=False))
        for chunk in here:
            self.live[chunk.seq.request_id].computed += chunk.count
        results = self.scheduler.advance(schedule, drawn)
        assert [seq.request_id for seq, _ in results] == sampling
        for seq, finish in results:
            expected = self.live[seq.request_id]
            expected.output.append(drawn[seq.request_id])
            assert seq.output == expected.output
            assert finish == self._finish(expected)
            if finish:
                del self.live[seq.request_id]

    def _finish(self, expected: Expected) -> FinishReason | None:
        sampling, output = expected.seq.sampling, expected.output
        stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else {EOS})
        if output[-1] in stops and len(output) > sampling.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(output) == expected.limit else None


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("adapters", [2, 3])
def test_adapters_take_turns_on_one_slot_under_a_steady_stream(adapters: int) -> None:
    """The first adapter's requests never stop coming; the others get the slot all the same."""
    gate, pool = Gate(slots=1), BlockPool(64, 4)
    eos: frozenset[int] = frozenset()
    scheduler = Scheduler(
        pool=pool, gate=gate, max_rows=4, max_step_tokens=16, context_length=64, eos_token_ids=eos, max_queue=1000
    )
    served: Counter[str] = Counter()
    for turn in range(300):
        adapter = ADAPTERS[0 if turn % 10 else turn // 10 % adapters]
        scheduler.add(Sequence(turn, (5,), Sampling(max_tokens=4), adapter), float(turn))
        gate.arrive()
        schedule = scheduler.schedule(float(turn))
        for seq, finish in scheduler.advance(schedule, {chunk.seq.request_id: 7 for chunk in schedule.chunks}):
            assert seq.adapter
            served[seq.adapter.digest] += finish is not None
    assert all(served[adapter.digest] >= 5 for adapter in ADAPTERS[:adapters])
