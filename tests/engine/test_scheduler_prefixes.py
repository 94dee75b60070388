"""Prompts that were here before: who finds their pages, and who must not."""

from typing import Any

import pytest

from chorus.engine.step_cost import Work
from support.scheduling import A, B, Bench, scheduled, work


def cached(bench: Bench, prompt: int = 10, **options: Any) -> int:
    """Runs a request of that prompt to its end; how many tokens of it were found."""
    seq = bench.add(prompt=prompt, **{"text": 0, "new": 2, **options})
    start = next(c.start for step in bench.run_out() for c in step.chunks if c.seq is seq)
    assert len(seq.output) == seq.sampling.max_tokens
    return start


class TestFinding:
    def test_a_repeated_prompt_starts_behind_its_full_pages(self) -> None:
        bench = Bench()
        assert [cached(bench), cached(bench)] == [0, 8]

    def test_a_prompt_that_fills_its_pages_computes_the_last_one_for_its_last_token(self) -> None:
        bench = Bench()
        assert [cached(bench, 8), cached(bench, 8), cached(bench, 9)] == [0, 4, 8]

    def test_a_longer_prompt_finds_the_beginning_that_it_shares(self) -> None:
        bench = Bench()
        assert [cached(bench, 10), cached(bench, 30), cached(bench, 30), cached(bench, 13)] == [0, 8, 28, 12]

    def test_a_request_finds_what_another_that_runs_has_computed(self) -> None:
        bench = Bench(max_step_tokens=8)
        first = bench.add(prompt=22, text=0)
        bench.steps(3)
        second = bench.add(prompt=22, text=0)
        assert work(bench.step()) == [(1, 22, 1, True), (2, 20, 2, True)]
        assert second.blocks[:5] == first.blocks[:5]

    def test_a_conversation_finds_the_answer_too(self) -> None:
        bench = Bench()
        seq = bench.add(prompt=6, new=8, text=0)
        bench.run_out()
        turn = bench.add(prompt=1)
        bench.scheduler.abort(turn.request_id)
        turn.prompt = (*seq.prompt, *seq.output, 5, 6)
        bench.scheduler.add([turn], 0.0)
        assert work(bench.step()) == [(turn.request_id, 12, 4, True)]

    def test_pages_of_a_prefill_that_was_aborted_are_found_as_far_as_it_came(self) -> None:
        bench = Bench(max_step_tokens=8)
        first = bench.add(prompt=30, text=0)
        bench.steps(2)
        bench.schedule()
        bench.scheduler.abort(first.request_id)
        bench.add(prompt=30, text=0)
        assert work(bench.step()) == [(2, 16, 8, False)]


class TestNotFinding:
    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ({"salt": "a"}, {"salt": "b"}),
            ({"salt": "a"}, {}),
            ({"adapter": A}, {"adapter": B}),
            ({"adapter": A}, {}),
            ({"adapter": A, "salt": "a"}, {"adapter": A, "salt": "b"}),
        ],
        ids=["tenants", "nobody", "adapters", "base", "tenants of one adapter"],
    )
    def test_another_tenant_or_version_finds_nothing(self, one: dict[str, Any], other: dict[str, Any]) -> None:
        bench = Bench(A, B)
        assert [cached(bench, **who) for who in (one, other, one, other)] == [0, 0, 8, 8]

    def test_the_same_tokens_behind_others_are_not_the_same(self) -> None:
        bench = Bench()
        first, second = bench.add(prompt=12), bench.add(prompt=12)
        second.prompt = (*second.prompt[:4], *first.prompt[4:])
        bench.step()
        bench.scheduler.abort(second.request_id)
        again = bench.add(prompt=12)
        again.prompt = (1, *first.prompt[1:])
        assert work(bench.step())[1] == (3, 0, 12, True)

    def test_pages_on_the_other_side_of_the_short_length_are_not_found(self) -> None:
        bench = Bench(short_length=12)
        found = [cached(bench, 10, new=1), cached(bench, 20, new=1), cached(bench, 10, new=1), cached(bench, 20, new=1)]
        assert found == [0, 0, 8, 16]

    def test_without_a_prefix_cache_only_outputs_of_one_request_share(self) -> None:
        bench = Bench(prefix_cache=False)
        assert [cached(bench), cached(bench)] == [0, 0]
        bench.add_outputs(2, prompt=10, text=0)
        assert [c.start for step in bench.steps(2) for c in step.chunks] == [0, 10, 8]

    def test_pages_of_a_request_that_failed_are_not_found(self) -> None:
        bench = Bench(max_step_tokens=8)
        bench.add(prompt=30, text=0)
        bench.steps(2)
        assert bench.scheduler.fail([1]) == [1]
        assert cached(bench, 30) == 0

    def test_a_prompt_that_is_to_be_told_of_is_computed_from_the_first_row_that_tells(self) -> None:
        bench = Bench()
        found = [
            cached(bench, 22, **reads)
            for reads in (
                {},
                {"prompt_logprobs": 0},
                {"prompt_logprobs": 0, "prompt_logprobs_from": 9},
                {"prompt_logprobs": 0, "prompt_logprobs_from": 18, "new": 0},
            )
        ]
        assert found == [0, 0, 8, 16]


class TestBeingComputed:
    """Of those that begin alike and come together the first computes the pages; the others wait for them."""

    def test_pages_are_waited_for_and_computed_once(self) -> None:
        bench = Bench()
        for _ in range(3):
            bench.add(prompt=10, text=0)
        assert work(bench.step()) == [(1, 0, 10, True)]
        assert work(bench.step()) == [(1, 10, 1, True), (2, 8, 2, True), (3, 8, 2, True)]

    def test_who_shares_less_waits_less(self) -> None:
        bench = Bench(max_step_tokens=8)
        first = bench.add(prompt=30, text=0)
        short, long = bench.add(prompt=9, text=0), bench.add(prompt=29, text=0)
        assert [scheduled(step) for step in bench.steps(3)] == [[first]] * 3  # which leaves nobody a token
        assert scheduled(bench.step()) == [first, short]
        assert scheduled(bench.step()) == [first, short, long]

    @pytest.mark.parametrize(
        ("one", "other"),
        [({"salt": "a"}, {"salt": "b"}), ({"adapter": A}, {"adapter": B}), ({"adapter": A}, {})],
        ids=["tenants", "adapters", "base"],
    )
    def test_another_tenant_or_version_waits_for_nobody(self, one: dict[str, Any], other: dict[str, Any]) -> None:
        bench = Bench(A, B)
        bench.add(prompt=10, text=0, **one), bench.add(prompt=10, text=0, **other)
        assert work(bench.step()) == [(1, 0, 10, True), (2, 0, 10, True)]

    def test_without_a_prefix_cache_nobody_waits(self) -> None:
        bench = Bench(prefix_cache=False)
        bench.add(prompt=10, text=0), bench.add(prompt=10, text=0)
        assert len(bench.step().chunks) == 2

    def test_others_go_on_meanwhile_and_are_not_kept_by_who_waits(self) -> None:
        bench = Bench()
        bench.add(prompt=10, text=0), bench.add(prompt=10, text=0)
        other = bench.add(prompt=3)
        assert other in scheduled(bench.step())

    def test_an_important_one_does_not_wait_for_a_less_important_one(self) -> None:
        bench = Bench(max_step_tokens=8)
        bench.add(prompt=30, text=0, priority=1)
        bench.step()
        bench.add(prompt=22, text=0)
        assert work(bench.step()) == [(2, 8, 8, False)]

    def test_it_waits_no_longer_when_the_first_one_leaves(self) -> None:
        bench = Bench(max_step_tokens=8)
        first, second = bench.add(prompt=30, text=0), bench.add(prompt=22, text=0)
        bench.step()
        bench.scheduler.abort(first.request_id)
        assert work(bench.step()) == [(second.request_id, 8, 8, False)]

    def test_its_deadline_ends_it(self) -> None:
        bench = Bench(max_step_tokens=8)
        bench.add(prompt=60, text=0)
        second = bench.add(prompt=60, text=0, deadline=5.0)
        bench.step(now=1.0)
        assert bench.step(now=5.0).expired == (second.request_id,)
        assert bench.scheduler.waiting == 0

    def test_nobody_waits_a_step_for_what_takes_less_time(self) -> None:
        """The step that it would wait costs as much as 20 tokens."""
        bench = Bench(blocks=100, context_length=400, max_step_tokens=100)
        for tokens in (1, 30, 90):
            bench.scheduler.cost.observe(Work(tokens), 20.0 + tokens)
        bench.add(prompt=18, text=0), bench.add(prompt=18, text=0)
        bench.add(prompt=30, text=1), bench.add(prompt=30, text=1)
        assert [c.seq.request_id for c in bench.step().chunks] == [1, 2, 3]


class TestMakingRoom:
    def test_who_needs_the_room_gets_it(self) -> None:
        bench = Bench(blocks=8, block_size=4)
        assert [cached(bench, 22), cached(bench, 30, text=1), cached(bench, 22)] == [0, 0, 0]

    def test_what_was_used_longest_ago_goes_first(self) -> None:
        bench = Bench(blocks=9, block_size=4)
        for text in (0, 1, 0):
            cached(bench, 14, text=text)
        cached(bench, 22, text=2)
        assert cached(bench, 14, text=0) == 12
        assert cached(bench, 14, text=1) == 0

    def test_a_preempted_sequence_starts_behind_its_own_pages(self) -> None:
        bench = Bench(blocks=6, block_size=4, max_rows=2)
        bench.add(prompt=9, new=12)
        second = bench.add(prompt=7, new=12)
        while not bench.step().preempted:
            pass
        length = second.length
        assert length > 9
        while second not in scheduled(step := bench.step()):
            pass
        assert next(c.start for c in step.chunks if c.seq is second) > 0
