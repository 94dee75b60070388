"""Who runs, and in which order: steps, the queue, adapters. Arbitrary histories are in test_scheduler_machine.py."""

import pytest

from chorus.engine.sequence import NO_SLOT
from chorus.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from support.scheduling import A, B, Bench, scheduled, work


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
        assert bench.scheduler.fail_adapter("a") == [seq.request_id for seq in lost]
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
