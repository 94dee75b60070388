"""Who stops running, and with what: preemption, the end, removal."""

from typing import Any

import pytest

from chorus.engine.messages import FinishReason, Sampling
from chorus.engine.sequence import NO_SLOT, Sequence
from support.scheduling import EOS, STOP_TOKEN, TOKEN, A, B, Bench, scheduled, work


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
        bench.scheduler.discard([first.request_id, second.request_id])
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

    def test_a_step_that_preempts_admits_nobody_of_the_same_priority(self) -> None:
        bench = Bench(blocks=8, block_size=2, max_rows=2)
        bench.add(prompt=2)
        bench.add(prompt=9)
        bench.step()
        other = bench.add(prompt=1)
        while not (step := bench.step()).preempted:
            pass
        assert step.started == ()
        assert other not in scheduled(bench.step())

    def test_the_preempted_comes_before_all_of_its_priority(self) -> None:
        bench, (first, second, third) = self.crowded()
        new = bench.add(prompt=1)
        while not bench.step().preempted:
            pass
        bench.scheduler.discard([first.request_id, second.request_id])
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
        bench.scheduler.discard([first.request_id])
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
        assert any(schedule.preempted for schedule in bench.run_out())
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
        assert step.expired == (late.request_id,)
        assert late not in scheduled(step)
        assert bench.step(now=7.0).expired == (later.request_id,)
        assert not late.started

    def test_a_running_deadline_gives_everything_back(self) -> None:
        bench = Bench(A)
        seq = bench.add(adapter=A, deadline=5.0)
        bench.step(now=1.0)
        step = bench.step(now=9.0)
        assert (step.expired, step.chunks) == ((seq.request_id,), ())
        assert (bench.pool.usage, bench.gate.refs["a"]) == (0, 0)

    def test_an_abort_works_while_queued_and_while_running(self) -> None:
        bench = Bench(A, max_rows=1)
        running, queued = bench.add(adapter=A), bench.add(adapter=B)
        bench.step()
        assert bench.scheduler.abort(queued.request_id) == [queued]
        assert bench.scheduler.abort(running.request_id) == [running]
        assert bench.scheduler.abort(running.request_id) == []
        assert (bench.pool.usage, bench.gate.refs["a"], bench.step().chunks) == (0, 0, ())

    def test_an_abort_during_the_step_drops_its_token(self) -> None:
        bench = Bench()
        gone, here = bench.add(), bench.add()
        schedule = bench.schedule()
        bench.scheduler.abort(gone.request_id)
        assert bench.scheduler.advance(schedule, {(1, 0): TOKEN, (2, 0): TOKEN}) == [(here, None)]
        assert gone.output == []

    def test_a_failed_step_can_be_discarded_whole(self) -> None:
        bench = Bench(A, max_rows=2)
        failed = [bench.add(adapter=A), bench.add()]
        waiting = bench.add()
        schedule = bench.schedule()
        bench.scheduler.abort(failed[1].request_id)
        assert bench.scheduler.discard(seq.request_id for seq in scheduled(schedule)) == [failed[0].request_id]
        assert (bench.pool.usage, bench.gate.refs["a"]) == (0, 0)
        assert scheduled(bench.step()) == [waiting]

    def test_a_request_id_can_be_used_again_but_not_twice_at_once(self) -> None:
        bench = Bench()
        seq = bench.add()
        with pytest.raises(ValueError, match="here already"):
            bench.scheduler.add([seq], 0.0)
        bench.scheduler.abort(1)
        bench.scheduler.add([Sequence(1, (5,), Sampling(max_tokens=1))], 0.0)
