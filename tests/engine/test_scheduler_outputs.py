"""Several outputs of one request: they share the pages of their prompt, and stand and fall together."""

import pytest

from chorus.engine.messages import FinishReason
from chorus.engine.sequence import Sequence
from chorus.errors import FailedPrecondition, ResourceExhausted
from support.scheduling import A, Bench, scheduled, work


def indices(sequences: list[Sequence]) -> list[int]:
    return [seq.index for seq in sequences]


class TestSharing:
    def test_siblings_start_behind_the_full_pages_that_the_first_has_computed(self) -> None:
        bench = Bench()
        outputs = bench.add_outputs(3, prompt=10)
        assert work(bench.step()) == [(1, 0, 10, True)]
        assert work(bench.step()) == [(1, 10, 1, True), (1, 8, 2, True), (1, 8, 2, True)]
        tables = [seq.blocks for seq in outputs]
        assert tables[0][:2] == tables[1][:2] == tables[2][:2]
        assert len({table[2] for table in tables}) == 3
        assert bench.used == 2 + 3

    def test_the_last_token_of_a_prompt_that_fills_its_pages_is_computed_by_each(self) -> None:
        bench = Bench()
        bench.add_outputs(2, prompt=8)
        bench.step()
        assert work(bench.step()) == [(1, 8, 1, True), (1, 4, 4, True)]

    def test_a_prompt_of_a_single_page_is_not_waited_for(self) -> None:
        bench = Bench()
        bench.add_outputs(3, prompt=4)
        assert work(bench.step()) == [(1, 0, 4, True)] * 3
        assert bench.used == 3

    def test_siblings_wait_for_a_prompt_in_several_chunks_and_are_overtaken_meanwhile(self) -> None:
        bench = Bench(max_step_tokens=8)
        outputs = bench.add_outputs(2, prompt=22)
        other = bench.add(prompt=1)
        assert [scheduled(step) for step in bench.steps(3)] == [[outputs[0]], [outputs[0]], [outputs[0], other]]
        assert work(bench.step()) == [(1, 22, 1, True), (2, 1, 1, True), (1, 20, 2, True)]

    def test_the_next_sibling_leads_when_the_first_leaves_before_it_is_done(self) -> None:
        bench = Bench(max_step_tokens=8)
        outputs = bench.add_outputs(3, prompt=22)
        bench.steps(2)
        bench.scheduler.abort(1, 0)
        step = bench.step()  # behind what the first has left, that is less than a chunk
        assert (indices(scheduled(step)), work(step)) == ([1], [(1, 16, 6, True)])
        assert outputs[1].output
        assert indices(scheduled(bench.step())) == [1, 2]

    def test_a_sibling_is_admitted_for_the_pages_that_it_adds(self) -> None:
        bench = Bench(blocks=7, block_size=4)
        bench.add_outputs(2, prompt=17, new=3)
        bench.step()
        assert len(bench.step().chunks) == 2
        assert bench.used == 6

    def test_a_sibling_waits_for_the_margin_that_everyone_waits_for(self) -> None:
        bench = Bench(blocks=6, block_size=4)
        bench.add_outputs(2, prompt=17, new=3)
        bench.step()
        assert len(bench.step().chunks) == 1

    def test_pages_are_given_back_by_the_last_who_has_them(self) -> None:
        bench = Bench()
        outputs = bench.add_outputs(2, prompt=10)
        bench.steps(2)
        bench.scheduler.abort(1, 0)
        assert bench.used == 3
        assert work(bench.step()) == [(1, 10, 1, True)]
        assert bench.scheduler.abort(1) == [outputs[1]]
        assert bench.used == 0


class TestPreempted:
    def crowded(self) -> tuple[Bench, Sequence, Sequence, Sequence]:
        """Another request and two outputs of one; the second of these has just been preempted."""
        bench = Bench(blocks=10, block_size=4)
        other = bench.add(prompt=13)
        bench.step()
        first, second = bench.add_outputs(2, prompt=9)
        while bench.step().preempted != (second,):
            pass
        assert second.output
        assert (second.blocks, second.computed) == ([], 0)
        return bench, other, first, second

    def test_output_finds_its_own_pages_again_and_shares_its_prompts_with_a_sibling(self) -> None:
        bench, other, first, second = self.crowded()
        bench.scheduler.abort(other.request_id)
        there = first.length - 1
        assert work(bench.step()) == [(2, there, 1, True), (2, 12, second.length - 1 - 12, True)]
        assert first.blocks[:2] == second.blocks[:2]

    def test_output_finds_its_pages_again_if_no_sibling_runs(self) -> None:
        bench, other, first, second = self.crowded()
        bench.scheduler.abort(other.request_id)
        bench.scheduler.abort(2, first.index)
        assert work(bench.step()) == [(2, 12, second.length - 1 - 12, True)]

    def test_output_computes_again_what_was_taken_meanwhile(self) -> None:
        bench, other, first, second = self.crowded()
        bench.scheduler.abort(other.request_id)
        bench.scheduler.abort(2, first.index)
        greedy = bench.add(prompt=37, new=1, priority=-1)
        assert scheduled(bench.step()) == [greedy]
        assert [work(step) for step in bench.steps(2)] == [[(3, 32, 5, True)], [(2, 0, second.length - 1, True)]]


class TestTogether:
    def test_more_outputs_than_rows_end_in_turns(self) -> None:
        bench = Bench(max_rows=2)
        outputs = bench.add_outputs(7, prompt=9, new=5)
        schedules = bench.run_out()
        assert {len(seq.output) for seq in outputs} == {5}
        assert max(len(step.chunks) for step in schedules) == 2
        assert bench.used == 0

    def test_all_outputs_end_in_a_cache_that_holds_one_of_them(self) -> None:
        bench = Bench(blocks=6, block_size=4, max_step_tokens=6)
        outputs = bench.add_outputs(4, prompt=9, new=15)
        assert any(step.preempted for step in bench.run_out())
        assert {len(seq.output) for seq in outputs} == {15}

    def test_a_request_starts_once(self) -> None:
        bench = Bench(max_rows=1)
        outputs = bench.add_outputs(3, new=2)
        started = [seq for step in bench.run_out() for seq in step.started]
        assert started == outputs[:1]

    def test_a_deadline_ends_all_outputs_running_or_not(self) -> None:
        bench = Bench(max_rows=2)
        bench.add_outputs(3, deadline=5.0)
        bench.step()
        step = bench.step(now=5.0)
        assert (step.expired, step.chunks) == ((1,), ())
        assert (bench.used, bench.scheduler.waiting) == (0, 0)

    def test_an_abort_of_the_request_ends_all_outputs_also_those_aside(self) -> None:
        bench = Bench(A, max_step_tokens=8)
        outputs = bench.add_outputs(3, prompt=22, adapter=A)
        bench.steps(3)
        assert bench.scheduler.abort(1) == outputs
        assert (bench.used, bench.scheduler.waiting, bench.gate.refs["a"]) == (0, 0, 0)

    def test_an_abort_of_one_output_leaves_the_others(self) -> None:
        bench = Bench(max_rows=2)
        bench.add_outputs(4, new=3)
        bench.step()
        assert indices(bench.scheduler.abort(1, 1)) == [1]  # it runs
        assert indices(bench.scheduler.abort(1, 3)) == [3]  # it waits
        assert bench.scheduler.abort(1, 3) == bench.scheduler.abort(1, 9) == []
        bench.run_out()
        assert indices([seq for seq, _ in bench.finished]) == [0, 2]

    def test_outputs_that_run_and_wait_are_discarded_as_one_request(self) -> None:
        bench = Bench(max_rows=2)
        bench.add_outputs(3)
        bench.add()
        step = bench.step()
        assert bench.scheduler.discard([seq.request_id for seq in scheduled(step)]) == [1]
        assert scheduled(bench.step())[0].request_id == 2

    def test_a_failed_load_ends_the_request_once(self) -> None:
        bench = Bench()
        bench.add_outputs(3, adapter=A)
        bench.step()
        assert bench.scheduler.fail_adapter("a") == [1]
        assert bench.scheduler.waiting == 0

    def test_a_failed_load_ends_those_aside_and_with_them_their_request(self) -> None:
        bench = Bench(A)
        bench.add_outputs(3, prompt=9, adapter=A)
        bench.step()
        assert bench.scheduler.fail_adapter("a") == [1]
        assert (bench.used, bench.scheduler.waiting, bench.gate.refs["a"]) == (0, 0, 0)

    def test_the_queue_takes_all_outputs_or_none(self) -> None:
        bench = Bench(max_queue=4)
        bench.add_outputs(2)
        with pytest.raises(ResourceExhausted) as error:
            bench.add_outputs(3)
        assert (error.value.reason, bench.scheduler.waiting) == ("QUEUE_FULL", 2)
        assert error.value.retry_after_s
        bench.add_outputs(2)

    def test_more_outputs_than_the_queue_ever_holds_are_no_reason_to_come_back(self) -> None:
        bench = Bench(max_queue=4)
        with pytest.raises(FailedPrecondition, match="5 outputs do not fit into the queue, which holds 4"):
            bench.add_outputs(5)


class TestPromptOnly:
    def test_ends_when_the_prompt_is_computed_and_samples_nothing(self) -> None:
        bench = Bench(max_step_tokens=8)
        seq = bench.add(prompt=12, new=0)
        assert [work(step) for step in bench.steps(2)] == [[(1, 0, 8, False)], [(1, 8, 4, False)]]
        assert bench.finished == [(seq, FinishReason.LENGTH)]
        assert (seq.output, bench.used) == ([], 0)

    def test_may_fill_the_context(self) -> None:
        bench = Bench(context_length=16)
        bench.add(prompt=16, new=0)
        bench.run_out()
        assert len(bench.finished) == 1
        with pytest.raises(Exception, match="17 tokens, the limit is 16"):
            bench.add(prompt=17, new=0)

    def test_of_several_outputs_ends_for_each(self) -> None:
        bench = Bench()
        bench.add_outputs(3, prompt=9, new=0)
        bench.run_out()
        assert indices([seq for seq, _ in bench.finished]) == [0, 1, 2]

    def test_its_first_output_computes_every_token_of_a_prompt_that_is_read(self) -> None:
        bench = Bench()
        outputs = bench.add_outputs(2, prompt=9, new=0, prompt_logprobs=0)
        assert [c.start for step in bench.run_out() for c in step.chunks if c.seq is outputs[0]] == [0]
