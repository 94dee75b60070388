"""More important ones run in the place of less important ones: who goes, for whom, and when they come back."""

from chorus.engine.sequence import NO_SLOT
from support.scheduling import A, B, Bench, scheduled, work


class TestRows:
    def test_an_urgent_one_takes_the_row_of_the_least_important_one_that_came_last(self) -> None:
        bench = Bench(max_rows=3)
        first, low, late = bench.add(priority=1), bench.add(priority=2), bench.add(priority=2)
        bench.step()
        urgent = bench.add()
        step = bench.step()
        assert step.preempted == (late,)
        assert scheduled(step) == [first, low, urgent]

    def test_it_takes_none_while_one_is_free(self) -> None:
        bench = Bench(max_rows=2)
        bench.add(priority=2)
        bench.step()
        bench.add()
        assert bench.step().preempted == ()

    def test_equals_never_preempt_each_other(self) -> None:
        bench = Bench(max_rows=2)
        bench.add(), bench.add()
        bench.step()
        bench.add()
        assert not any(step.preempted for step in bench.steps(20))

    def test_a_decode_gives_its_token_too_where_decodes_take_them_all(self) -> None:
        bench = Bench(max_rows=2, max_step_tokens=2)
        bench.add(prompt=1, priority=1), bench.add(prompt=1, priority=1)
        bench.step()
        urgent = bench.add(prompt=1)
        assert scheduled(bench.step())[1] is urgent

    def test_who_was_preempted_for_it_comes_back_after_it_behind_its_own_pages_with_its_output(self) -> None:
        bench = Bench(max_rows=1)
        low = bench.add(prompt=9, new=8, priority=1)
        bench.steps(4)
        output = list(low.output)
        urgent = bench.add(new=3)
        assert [scheduled(step) for step in bench.steps(3)] == [[urgent]] * 3
        assert work(bench.step()) == [(1, 12, 1, True)]  # 9 of the prompt and 4 of its own, three pages of them found
        assert low.output[:4] == output

    def test_a_prefill_that_stands_still_gives_its_row(self) -> None:
        bench = Bench(max_rows=1, max_step_tokens=8)
        bench.add(prompt=30, priority=1)
        bench.step()
        urgent = bench.add(prompt=12, new=1)
        assert [scheduled(step) for step in bench.steps(2)] == [[urgent], [urgent]]
        assert work(bench.step()) == [(1, 8, 8, False)]

    def test_nobody_goes_for_who_gets_no_token_in_this_step(self) -> None:
        bench = Bench(max_rows=2, max_step_tokens=8)
        bench.add(prompt=1, priority=1)
        bench.step()
        bench.add(prompt=40)
        bench.step()
        bench.add(prompt=1)
        assert bench.step().preempted == ()

    def test_nobody_goes_for_who_waits_for_its_adapter(self) -> None:
        bench = Bench(A, max_rows=1)
        low = bench.add(adapter=A, priority=1)
        bench.step()
        urgent = bench.add(adapter=B)
        assert scheduled(bench.step()) == [low]
        bench.gate.slots["b"] = 5
        step = bench.step()
        assert (step.preempted, scheduled(step)) == ((low,), [urgent])
        assert (low.slot, bench.gate.refs["a"], bench.gate.refs["b"]) == (NO_SLOT, 0, 1)

    def test_who_is_urgent_and_can_share_pages_being_computed_waits_for_them_and_takes_no_row_meanwhile(self) -> None:
        bench = Bench(max_rows=2, max_step_tokens=8)
        low = bench.add(prompt=1, priority=1)
        bench.step()
        leader = bench.add(prompt=20, text=0)
        bench.step()
        follower = bench.add(prompt=20, text=0)
        step = bench.step()
        assert (step.preempted, scheduled(step)) == ((), [low, leader])
        bench.step()
        step = bench.step()
        assert step.preempted == (low,)
        assert scheduled(step) == [leader, follower]


class TestPages:
    def test_an_urgent_one_takes_those_of_as_many_as_it_needs(self) -> None:
        bench = Bench(blocks=12, block_size=4)
        kept, second, third = (bench.add(prompt=11, priority=p) for p in (1, 2, 2))
        bench.step()
        urgent = bench.add(prompt=20, new=1)
        step = bench.step()
        assert step.preempted == (third, second)
        assert scheduled(step) == [kept, urgent]

    def test_nobody_goes_where_it_would_not_fit_all_the_same(self) -> None:
        bench = Bench(blocks=8, block_size=4)
        important, low = bench.add(prompt=15), bench.add(prompt=3, priority=1)
        bench.step()
        bench.add(prompt=20, new=1)
        step = bench.step()
        assert (step.preempted, scheduled(step)) == ((), [important, low])

    def test_pages_that_others_share_are_not_counted_as_room(self) -> None:
        bench = Bench(blocks=8, block_size=4)
        first = bench.add(prompt=17, text=0)
        bench.step()
        second = bench.add(prompt=17, text=0, priority=1)
        bench.step()
        assert first.blocks[:4] == second.blocks[:4]
        bench.add(prompt=12, new=1)  # three pages: two are free, and the second one's own makes three, without a margin
        assert bench.step().preempted == ()

    def test_who_lost_its_pages_does_not_come_back_in_the_step_in_which_it_lost_them(self) -> None:
        bench = Bench(blocks=12, block_size=4)
        large, small = bench.add(prompt=30, priority=1), bench.add(prompt=1, priority=1)
        bench.step()
        urgent = bench.add(prompt=20, new=2)
        step = bench.step()
        assert (step.preempted, scheduled(step)) == ((small, large), [urgent])

    def test_an_urgent_one_starts_also_while_decodes_lack_blocks(self) -> None:
        bench = Bench(blocks=8, block_size=2, max_rows=4)
        bench.add(prompt=2, priority=1), bench.add(prompt=9, priority=1)
        while bench.pool.free_count:
            bench.step()
        urgent = bench.add(prompt=1, new=2)
        step = bench.step()
        assert step.preempted
        assert urgent in scheduled(step)
