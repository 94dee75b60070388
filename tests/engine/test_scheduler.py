"""What the scheduler promises, one claim at a time. Arbitrary histories are in test_scheduler_machine.py."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

from chorus.engine.kv_cache import BlockPool
from chorus.engine.messages import AdapterRef, FinishReason, Sampling
from chorus.engine.scheduler import Schedule, Scheduler
from chorus.engine.sequence import NO_SLOT, Sequence
from chorus.errors import FailedPrecondition, InvalidArgument, ResourceExhausted

EOS, STOP_TOKEN, TOKEN = 0, 1, 7
A, B, C = (AdapterRef(digest, f"/{digest}") for digest in "abc")


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


class Bench:
    """A scheduler with its pool and gate; each step runs, and is checked before and after."""

    def __init__(self, *resident: AdapterRef, blocks: int = 64, block_size: int = 4, **limits: int) -> None:
        self.pool, self.gate, self.ids = BlockPool(blocks, block_size), Gate(*resident), 0
        limits = {"max_rows": 8, "max_step_tokens": 32, "context_length": 128, "max_queue": 2000} | limits
        eos = frozenset({EOS})
        self.scheduler = Scheduler(pool=self.pool, gate=self.gate, eos_token_ids=eos, **limits)
        self.finished: list[tuple[Sequence, FinishReason]] = []

    def add(self, prompt: int = 4, new: int = 100, now: float = 0.0, **options: Any) -> Sequence:
        where = {name: options.pop(name) for name in ("adapter", "priority", "deadline") if name in options}
        self.ids += 1
        seq = Sequence(self.ids, tuple(range(100, 100 + prompt)), Sampling(new, **options), **where)
        self.scheduler.add(seq, now)
        return seq

    def schedule(self, now: float = 0.0) -> Schedule:
        schedule = self.scheduler.schedule(now)
        self.scheduler.check_integrity()
        return schedule

    def step(self, now: float = 0.0, tokens: Mapping[int, int] | None = None) -> Schedule:
        schedule = self.schedule(now)
        sampling = {chunk.seq.request_id: TOKEN for chunk in schedule.chunks if chunk.samples}
        for seq, finish in self.scheduler.advance(schedule, sampling | dict(tokens or {})):
            if finish:
                self.finished.append((seq, finish))
        self.scheduler.check_integrity()
        return schedule

    def steps(self, count: int) -> list[Schedule]:
        return [self.step() for _ in range(count)]


def work(schedule: Schedule) -> list[tuple[int, int, int, bool]]:
    return [(chunk.seq.request_id, chunk.start, chunk.count, chunk.samples) for chunk in schedule.chunks]


def scheduled(schedule: Schedule) -> list[Sequence]:
    return [chunk.seq for chunk in schedule.chunks]


class TestStep:
    def test_mixes_decodes_and_prefills(self) -> None:
        bench = Bench()
        bench.add(prompt=3)
        assert work(bench.step()) == [(1, 0, 3, True)]
        bench.add(prompt=5)
        assert work(bench.step()) == [(1, 3, 1, True), (2, 0, 5, True)]

    def test_splits_a_long_prompt_and_samples_after_its_last_token(self) -> None:
        bench = Bench(max_step_tokens=8)
        bench.add(prompt=20)
        assert [work(step) for step in bench.steps(4)] == [
            [(1, 0, 8, False)],
            [(1, 8, 8, False)],
            [(1, 16, 4, True)],
            [(1, 20, 1, True)],
        ]

    def test_gives_every_decode_its_token_before_prefills_eat_the_budget(self) -> None:
        bench = Bench(max_step_tokens=8, max_rows=4)
        bench.add(prompt=20, priority=-1)
        bench.step()
        short = [bench.add(prompt=1), bench.add(prompt=1)]
        bench.steps(2)  # the long prompt goes on first, then the short ones fit
        assert [seq.length for seq in short] == [2, 2]
        bench.add(prompt=30, priority=-2)
        assert work(bench.step())[-1] == (4, 0, 5, False)  # behind three decodes

    def test_leaves_what_the_budget_does_not_cover_in_the_queue(self) -> None:
        bench = Bench(max_step_tokens=8)
        bench.add(prompt=8)
        bench.add(prompt=2)
        assert work(bench.step()) == [(1, 0, 8, True)]
        assert bench.scheduler.waiting == 1

    def test_has_a_token_for_each_row_whatever_max_rows_says(self) -> None:
        bench = Bench(max_rows=8, max_step_tokens=3)
        for _ in range(5):
            bench.add(prompt=1)
        assert len(bench.step().chunks) == 3
        assert len(bench.step().chunks) == 3

    def test_says_once_that_a_sequence_started(self) -> None:
        bench = Bench()
        seq = bench.add()
        assert [step.started for step in bench.steps(3)] == [(seq,), (), ()]


class TestQueue:
    def test_runs_smaller_priorities_first_then_earlier_arrivals(self) -> None:
        bench = Bench(max_rows=1)
        late, first, second = bench.add(priority=1, new=1), bench.add(new=1), bench.add(new=1)
        assert [scheduled(step) for step in bench.steps(3)] == [[first], [second], [late]]

    def test_is_not_overtaken_by_what_is_smaller_when_blocks_are_short(self) -> None:
        bench = Bench(blocks=8, block_size=4)
        bench.add(prompt=12, new=9)
        bench.step()
        large = bench.add(prompt=24, new=1)
        small = bench.add(prompt=1, new=1)
        while large not in scheduled(step := bench.step()):
            assert small not in scheduled(step)
        assert scheduled(step)[:2] == [large, small]

    def test_is_refused_when_full_and_says_when_to_come_back(self) -> None:
        bench = Bench(max_queue=2)
        bench.add()
        bench.add()
        with pytest.raises(ResourceExhausted) as error:
            bench.add()
        assert error.value.reason == "QUEUE_FULL"
        assert error.value.retry_after_s
        bench.step()
        bench.add()  # whoever runs does not wait

    def test_refuses_a_prompt_that_leaves_the_context_no_token(self) -> None:
        bench = Bench(context_length=16)
        bench.add(prompt=15)
        with pytest.raises(InvalidArgument, match="16 tokens, the limit is 15"):
            bench.add(prompt=16)

    def test_refuses_a_prompt_that_the_whole_cache_does_not_hold(self) -> None:
        bench = Bench(blocks=2, block_size=4)
        bench.add(prompt=7)
        with pytest.raises(FailedPrecondition, match="8 tokens, the limit is 7"):
            bench.add(prompt=8)

    def test_admits_only_if_every_running_sequence_can_still_grow(self) -> None:
        bench = Bench(blocks=4, block_size=4)
        bench.add(prompt=4)
        bench.step()
        bench.add(prompt=5)
        assert len(bench.step().chunks) == 1  # two blocks are free, but then the decode would soon have none
        assert bench.scheduler.waiting == 1


class TestAdapters:
    def test_a_missing_one_holds_nobody_else_up(self) -> None:
        bench = Bench(A)
        absent, present, base = bench.add(adapter=B), bench.add(adapter=A), bench.add()
        assert scheduled(bench.step()) == [present, base]
        assert bench.scheduler.waiting_for_adapter == 1
        assert bench.gate.asked == ["b"]
        bench.gate.slots["b"] = 5
        assert absent in bench.step().started
        assert (absent.slot, present.slot, base.slot) == (5, 0, NO_SLOT)
        assert bench.scheduler.waiting_for_adapter == 0

    def test_are_referenced_by_running_sequences_only(self) -> None:
        bench = Bench(A, max_rows=2)
        for _ in range(3):
            bench.add(adapter=A, new=2)
        counts = []
        while bench.scheduler.running + bench.scheduler.waiting:
            bench.step()
            counts.append(bench.gate.refs["a"])
        assert counts == [2, 0, 1, 0]

    def test_those_of_one_adapter_keep_their_order(self) -> None:
        bench = Bench(max_rows=1)
        waiting = [bench.add(adapter=A, new=1) for _ in range(3)]
        bench.step()
        bench.gate.slots["a"] = 0
        assert [scheduled(step) for step in bench.steps(3)] == [[seq] for seq in waiting]

    def test_the_time_without_them_is_counted(self) -> None:
        bench = Bench(max_rows=1)
        first, second = bench.add(adapter=A, new=1), bench.add(adapter=A, new=1)
        bench.step(now=10.0)
        third = bench.add(adapter=A, now=11.0)
        bench.gate.slots["a"] = 0
        bench.step(now=14.0)
        bench.steps(2)  # the others wait for a row now, which is not the adapter's fault
        assert (first.adapter_wait, second.adapter_wait, third.adapter_wait) == (4.0, 4.0, 3.0)

    def test_the_time_without_them_adds_up_when_they_are_evicted_again(self) -> None:
        bench = Bench(max_rows=1)
        first, second = bench.add(adapter=A, new=1), bench.add(adapter=A)
        bench.step(now=10.0)
        bench.gate.slots["a"] = 0
        bench.step(now=14.0)
        assert (first.started, second.started) == (True, False)
        del bench.gate.slots["a"]
        bench.step(now=20.0)
        bench.gate.slots["a"] = 0
        bench.step(now=23.0)
        assert second.adapter_wait == 4.0 + 3.0

    def test_a_failed_load_ends_all_that_wait_for_it_and_nobody_else(self) -> None:
        bench = Bench(B)
        lost = [bench.add(adapter=A), bench.add(adapter=A)]
        other = bench.add(adapter=B)
        bench.step()
        assert bench.scheduler.fail_adapter("a") == lost
        assert bench.scheduler.fail_adapter("a") == []
        assert scheduled(bench.step()) == [other]
        assert bench.scheduler.waiting == 0

    def test_a_thousand_who_wait_for_one_cost_one_question_a_step(self) -> None:
        bench = Bench()
        for _ in range(1000):
            bench.add(adapter=A)
        bench.steps(3)
        assert bench.gate.asked == ["a"] * 3
        assert bench.scheduler.waiting_for_adapter == 1000

    def test_a_head_without_blocks_keeps_no_reference(self) -> None:
        bench = Bench(A, blocks=4, block_size=4)
        bench.add(prompt=8)
        bench.add(prompt=12, adapter=A)
        bench.step()
        assert bench.gate.refs["a"] == 0


class TestPreemption:
    def crowded(self, **last: Any) -> tuple[Bench, list[Sequence]]:
        """Three decodes with a full last block each, and no block free for any of them."""
        bench = Bench(A, blocks=6, block_size=4, max_rows=3)
        running = []
        for options in ({"prompt": 4}, {"prompt": 3}, {"prompt": 2, **last}):
            running.append(bench.add(**options))
            bench.step()
        while bench.pool.free_count:
            bench.step()
        return bench, running

    def test_takes_the_most_recent_one_and_keeps_its_output(self) -> None:
        bench, (first, second, third) = self.crowded(adapter=A)
        while not (preempted := bench.step().preempted):
            pass
        assert preempted == (third,)
        output = list(third.output)
        assert output
        assert (third.computed, third.blocks, third.slot, bench.gate.refs["a"]) == (0, [], NO_SLOT, 0)
        assert {first.request_id, second.request_id}.isdisjoint(seq.request_id for seq in preempted)
        bench.scheduler.discard([first, second])
        assert work(bench.step()) == [(third.request_id, 0, 2 + len(output), True)]
        assert third.output == [*output, TOKEN]

    def test_spares_whoever_is_more_important(self) -> None:
        bench = Bench(blocks=4, block_size=2)
        bench.add(prompt=2)
        bench.step()
        urgent = bench.add(prompt=2, priority=-1)
        while not (preempted := bench.step().preempted):
            pass
        assert urgent.output
        assert urgent not in preempted

    def test_a_step_that_preempts_admits_nobody(self) -> None:
        bench = Bench(blocks=8, block_size=2, max_rows=2)
        bench.add(prompt=2)
        bench.add(prompt=9)
        bench.step()
        urgent = bench.add(prompt=1, priority=-1)
        while not (step := bench.step()).preempted:
            pass
        assert step.started == ()
        assert bench.step().started == (urgent,)

    def test_the_preempted_comes_before_all_of_its_priority(self) -> None:
        bench, (first, second, third) = self.crowded()
        new = bench.add(prompt=1)
        while not bench.step().preempted:
            pass
        bench.scheduler.discard([first, second])
        step = bench.step()
        assert scheduled(step) == [third, new]
        assert step.started == (new,)

    def test_the_preempted_comes_before_what_arrived_earlier_but_never_ran(self) -> None:
        bench = Bench(blocks=6, block_size=4, max_rows=3)
        early = bench.add(adapter=A)
        first, second = bench.add(prompt=4), bench.add(prompt=4)
        while not bench.step().preempted:
            pass
        bench.gate.slots["a"] = 0
        bench.scheduler.discard([first])
        assert scheduled(bench.step()) == [second, early]

    def test_the_last_one_sits_out_instead_of_taking_from_those_before_it(self) -> None:
        bench = Bench(blocks=4, block_size=2, max_rows=2)
        important, other = bench.add(prompt=4, priority=-1), bench.add(prompt=1)
        bench.steps(2)
        assert scheduled(bench.step()) == [important]
        assert other.blocks
        assert bench.step().preempted == (other,)

    def test_everyone_finishes_in_a_cache_that_holds_one_of_them(self) -> None:
        bench = Bench(blocks=5, block_size=4, max_step_tokens=6)
        everyone = [bench.add(prompt=5, new=14) for _ in range(4)]
        schedules = []
        while bench.scheduler.running + bench.scheduler.waiting:
            schedules.append(bench.step())
            assert len(schedules) < 200
        assert any(schedule.preempted for schedule in schedules)
        assert {len(seq.output) for seq in everyone} == {14}


class TestEnd:
    def run_to_the_end(self, bench: Bench, tokens: list[int]) -> tuple[int, FinishReason]:
        """Feeds tokens to request 1 until it ends; how many it took, and why."""
        for token in tokens:
            bench.step(tokens={1: token})
            if bench.finished:
                break
        (seq, reason) = bench.finished[0]
        assert bench.pool.usage == 0
        return len(seq.output), reason

    def test_comes_with_max_tokens(self) -> None:
        bench = Bench()
        bench.add(new=3)
        assert self.run_to_the_end(bench, [TOKEN] * 9) == (3, FinishReason.LENGTH)

    def test_comes_with_eos(self) -> None:
        bench = Bench()
        bench.add()
        assert self.run_to_the_end(bench, [TOKEN, EOS]) == (2, FinishReason.STOP)

    def test_with_eos_as_the_last_token_is_a_stop(self) -> None:
        bench = Bench()
        bench.add(new=2)
        assert self.run_to_the_end(bench, [TOKEN, EOS]) == (2, FinishReason.STOP)

    def test_does_not_come_with_an_ignored_eos(self) -> None:
        bench = Bench()
        bench.add(new=4, ignore_eos=True)
        assert self.run_to_the_end(bench, [EOS] * 9) == (4, FinishReason.LENGTH)

    def test_comes_with_a_stop_token_also_if_eos_is_ignored(self) -> None:
        bench = Bench()
        bench.add(stop_token_ids=frozenset({STOP_TOKEN}), ignore_eos=True)
        assert self.run_to_the_end(bench, [EOS, STOP_TOKEN]) == (2, FinishReason.STOP)

    def test_does_not_come_with_the_first_min_tokens(self) -> None:
        bench = Bench()
        bench.add(min_tokens=2, stop_token_ids=frozenset({STOP_TOKEN}))
        assert self.run_to_the_end(bench, [EOS, STOP_TOKEN, EOS]) == (3, FinishReason.STOP)

    def test_comes_with_the_context(self) -> None:
        bench = Bench(context_length=10)
        bench.add(prompt=4)
        assert self.run_to_the_end(bench, [TOKEN] * 99) == (6, FinishReason.LENGTH)

    def test_comes_with_the_whole_cache(self) -> None:
        bench = Bench(blocks=3, block_size=4)
        bench.add(prompt=4)
        assert self.run_to_the_end(bench, [TOKEN] * 99) == (8, FinishReason.LENGTH)


class TestRemoval:
    def test_a_queued_deadline_passes_unscheduled(self) -> None:
        bench = Bench(max_rows=1)
        bench.add()
        bench.step()
        late, later = bench.add(deadline=5.0), bench.add(deadline=6.0)
        step = bench.step(now=5.0)
        assert step.expired == (late,)
        assert late not in scheduled(step)
        assert bench.step(now=7.0).expired == (later,)
        assert not late.started

    def test_a_running_deadline_gives_everything_back(self) -> None:
        bench = Bench(A)
        seq = bench.add(adapter=A, deadline=5.0)
        bench.step(now=1.0)
        step = bench.step(now=9.0)
        assert (step.expired, step.chunks) == ((seq,), ())
        assert (bench.pool.usage, bench.gate.refs["a"]) == (0, 0)

    def test_an_abort_works_while_queued_and_while_running(self) -> None:
        bench = Bench(A, max_rows=1)
        running, queued = bench.add(adapter=A), bench.add(adapter=B)
        bench.step()
        assert bench.scheduler.abort(queued.request_id) is queued
        assert bench.scheduler.abort(running.request_id) is running
        assert bench.scheduler.abort(running.request_id) is None
        assert (bench.pool.usage, bench.gate.refs["a"], bench.step().chunks) == (0, 0, ())

    def test_an_abort_during_the_step_drops_its_token(self) -> None:
        bench = Bench()
        gone, here = bench.add(), bench.add()
        schedule = bench.schedule()
        bench.scheduler.abort(gone.request_id)
        assert bench.scheduler.advance(schedule, {1: TOKEN, 2: TOKEN}) == [(here, None)]
        assert gone.output == []

    def test_a_failed_step_can_be_discarded_whole(self) -> None:
        bench = Bench(A, max_rows=2)
        failed = [bench.add(adapter=A), bench.add()]
        waiting = bench.add()
        schedule = bench.schedule()
        bench.scheduler.abort(failed[1].request_id)
        assert bench.scheduler.discard(scheduled(schedule)) == failed[:1]
        assert (bench.pool.usage, bench.gate.refs["a"]) == (0, 0)
        assert scheduled(bench.step()) == [waiting]

    def test_all_can_be_discarded(self) -> None:
        bench = Bench(max_rows=1)
        everyone = [bench.add(), bench.add(deadline=1.0), bench.add(adapter=A)]
        bench.schedule()
        assert bench.scheduler.discard_all() == everyone
        assert bench.schedule(now=2.0) == ((), (), (), ())

    def test_a_request_id_can_be_used_again_but_not_twice_at_once(self) -> None:
        bench = Bench()
        seq = bench.add()
        with pytest.raises(ValueError, match="here already"):
            bench.scheduler.add(seq, 0.0)
        bench.scheduler.abort(1)
        bench.scheduler.add(Sequence(1, (5,), Sampling(max_tokens=1)), 0.0)
