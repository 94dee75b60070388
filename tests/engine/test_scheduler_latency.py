"""Steps of a bounded length, in simulated time: a real scheduler, and a law for how long its steps take."""

import random
from typing import Any

import pytest

from chorus.engine.schedule import Schedule
from chorus.engine.sequence import Sequence
from chorus.engine.step_cost import Work
from chorus.errors import DeadlineExceeded, ResourceExhausted
from support.scheduling import A, Bench, work

TARGET_S = 0.05


def law(step: Work) -> float:
    return 4e-3 + 2e-4 * step.tokens + 2e-8 * step.pairs


class Clocked:
    """A bench whose steps take what a law says, with noise, and which tells the scheduler so."""

    def __init__(self, noise: float = 0.05, **options: Any) -> None:
        limits = {"blocks": 4000, "block_size": 16, "max_rows": 16, "max_step_tokens": 512, "context_length": 8000}
        self.bench = Bench(**(limits | {"target_step_s": TARGET_S} | options))
        self.rng, self.noise, self.now = random.Random(7), noise, 0.0
        self.first: dict[int, float] = {}

    def step(self) -> tuple[Schedule, float]:
        schedule = self.bench.step(self.now)
        seconds = law(schedule.work()) * (1 + self.noise * abs(self.rng.gauss(0, 1)))
        self.bench.scheduler.cost.observe(schedule.work(), seconds)
        self.now += seconds
        return schedule, seconds


def test_steps_with_streams_stay_in_time_while_long_prompts_come() -> None:
    clocked, pauses = Clocked(), []
    for _ in range(8):
        clocked.bench.add(prompt=20, new=2000)
    for turn in range(400):
        if turn % 20 == 10:
            clocked.bench.add(prompt=3000, new=1)
        pauses.append(clocked.step()[1])
    pauses = sorted(pauses[40:])
    assert pauses[len(pauses) * 95 // 100] <= TARGET_S
    assert pauses[-1] <= 1.5 * TARGET_S
    assert pauses[len(pauses) // 2] > 0.6 * TARGET_S, "prompts take less than they may"


def test_without_streams_a_prompt_takes_the_whole_step() -> None:
    clocked = Clocked()
    clocked.bench.add(prompt=2000, new=1)
    assert [chunk.count for _ in range(4) for chunk in clocked.step()[0].chunks] == [512, 512, 512, 464]


def test_a_prompt_goes_on_by_a_page_where_streams_alone_take_longer_than_the_bound() -> None:
    clocked = Clocked(target_step_s=1e-3)
    for _ in range(8):
        clocked.bench.add(prompt=20, new=2000)
    clocked.step()
    clocked.step()
    prompt = clocked.bench.add(prompt=100, new=1)
    chunks = [[c.count for c in clocked.step()[0].chunks if c.seq is prompt] for _ in range(7)]
    assert chunks == [[16]] * 6 + [[4]]


@pytest.mark.parametrize("seed", range(3))
def test_everybody_ends_in_random_traffic_and_nobody_waits_for_ever(seed: int) -> None:
    """Arrivals of all sizes, about as many as the machine can take; the cache is too small for all of them."""
    rng = random.Random(seed)
    clocked = Clocked(blocks=300, context_length=2000)
    arrived: dict[Sequence, float] = {}
    ended: dict[Sequence, float] = {}
    at = 0.0
    while len(ended) < 60:
        while len(arrived) < 60 and at <= clocked.now:
            seq = clocked.bench.add(
                prompt=rng.choice([5, 50, 400, 1500]), new=rng.randint(1, 100), text=rng.randint(0, 9), now=clocked.now
            )
            arrived[seq] = clocked.now
            at += rng.expovariate(4)
        clocked.step()
        for seq, _ in clocked.bench.finished:
            ended.setdefault(seq, clocked.now)
        assert clocked.now < 600, "somebody does not end"
    assert max(ended[seq] - arrived[seq] for seq in arrived) < 60
    assert clocked.bench.used == 0


def test_without_a_bound_chunks_are_as_long_as_the_step() -> None:
    clocked = Clocked(target_step_s=None)
    clocked.bench.add(prompt=4, new=100)
    clocked.step()
    clocked.bench.add(prompt=600, new=1)
    assert [work(clocked.step()[0])[1][2] for _ in range(2)] == [511, 89]


class TestDeadline:
    def learned(self, **options: Any) -> Clocked:
        """Knows what steps cost: 0.2 ms a token and 4 ms a step."""
        clocked = Clocked(0.0, **options)
        for prompt in (1, 30, 500, 100):
            clocked.bench.add(prompt=prompt, new=1)
            clocked.step()
        return clocked

    def test_that_the_prompt_alone_can_not_meet_is_exceeded_at_once(self) -> None:
        clocked = self.learned()
        with pytest.raises(DeadlineExceeded, match=r"takes 0\.8 s, the deadline is in 0.3 s") as error:
            clocked.bench.add(prompt=4000, deadline=clocked.now + 0.3, now=clocked.now)
        assert error.value.reason == "DEADLINE_TOO_SOON"
        assert clocked.bench.scheduler.waiting == 0

    def test_that_the_queue_can_not_meet_is_refused_with_the_time_to_come_back(self) -> None:
        clocked = self.learned()
        for _ in range(4):
            clocked.bench.add(prompt=3000)
        with pytest.raises(ResourceExhausted, match=r"those ahead take 2\.4 s, the deadline is in 1 s") as error:
            clocked.bench.add(prompt=20, deadline=clocked.now + 1.0, now=clocked.now)
        assert error.value.reason == "DEADLINE_UNREACHABLE"
        assert error.value.retry_after_s == pytest.approx(2.4, rel=0.1)

    @pytest.mark.parametrize(
        "options",
        [{"priority": -1}, {"text": 0}, {"deadline": 2.5}],
        ids=["before the queue", "found", "within twice the rate"],
    )
    def test_that_can_be_met_is_taken(self, options: dict[str, Any]) -> None:
        clocked = self.learned()
        clocked.bench.add(prompt=3000, new=1, text=0)
        while clocked.bench.scheduler.running + clocked.bench.scheduler.waiting:
            clocked.step()
        for _ in range(4):
            clocked.bench.add(prompt=3000, **({"text": 0} if "text" in options else {}))
        deadline = clocked.now + options.pop("deadline", 0.05)
        clocked.bench.add(prompt=20, deadline=deadline, now=clocked.now, **options)

    def test_is_not_spoiled_by_those_who_wait_for_an_adapter(self) -> None:
        clocked = self.learned()
        for _ in range(4):
            clocked.bench.add(prompt=3000, adapter=A)
        clocked.step()
        clocked.bench.add(prompt=20, deadline=clocked.now + 0.1, now=clocked.now)

    def test_is_not_judged_before_any_step_has_run(self) -> None:
        Clocked().bench.add(prompt=4000, deadline=1e-6)

    def test_is_not_judged_by_steps_of_one_size(self) -> None:
        """A cold step of 0.3 s with 5 tokens does not say that 500 take 30 s."""
        clocked = Clocked()
        for _ in range(3):
            clocked.bench.scheduler.cost.observe(Work(5, 15), 0.3)
        clocked.bench.add(prompt=500, deadline=1.0)

    @pytest.mark.parametrize("seed", range(3))
    def test_that_is_kept_without_a_refusal_is_never_refused(self, seed: int) -> None:
        """The same traffic twice: when did first tokens come, and would those have been refused that asked for them?"""
        kept = traffic(seed, {})
        refused = traffic(seed, kept)
        assert len(kept) > 15
        assert kept == refused


def traffic(seed: int, deadlines: dict[int, float]) -> dict[int, float]:
    """When requests that ask for a single token have it, by their numbers; others run beside them."""
    rng, clocked = random.Random(seed), Clocked(blocks=600, context_length=2000)
    number = 0
    at = 0.0
    while number < 60 or clocked.bench.scheduler.running + clocked.bench.scheduler.waiting:
        while number < 60 and at <= clocked.now:
            options = {"prompt": rng.choice([5, 50, 400, 1500]), "new": rng.choice([1, 40]), "text": rng.randint(0, 99)}
            options["priority"] = rng.randint(0, 1)
            number += 1
            clocked.bench.add(now=clocked.now, deadline=deadlines.get(number), **options)
            at += rng.expovariate(12)
        clocked.step()
        for seq, _ in clocked.bench.finished:
            if len(seq.output) == 1:
                clocked.first.setdefault(seq.request_id, clocked.now)
    return clocked.first


class TestPriority:
    def test_an_important_prompt_goes_before_a_long_one_that_is_under_way(self) -> None:
        bench = Bench(max_step_tokens=8)
        bench.add(prompt=40, new=1, priority=1)
        bench.step()
        bench.add(prompt=11, new=1)
        assert [work(step) for step in bench.steps(3)] == [
            [(2, 0, 8, False)],
            [(2, 8, 3, True), (1, 8, 5, False)],
            [(1, 13, 8, False)],
        ]

    def test_a_prompt_of_the_same_priority_waits_for_the_one_under_way(self) -> None:
        bench = Bench(max_step_tokens=8)
        bench.add(prompt=20, new=1)
        bench.step()
        bench.add(prompt=11, new=1)
        assert [work(step) for step in bench.steps(2)] == [[(1, 8, 8, False)], [(1, 16, 4, True), (2, 0, 4, False)]]

    def test_more_important_prompts_take_turns_before_the_one_that_stands_still(self) -> None:
        bench = Bench(max_step_tokens=8)
        for priority in (3, 2, 1):
            bench.add(prompt=20, new=1, priority=priority)
            bench.step()
        bench.run_out()
        assert [seq.priority for seq, _ in bench.finished] == [1, 2, 3]

    def test_a_missing_adapter_of_an_important_prompt_is_asked_for_once_a_step(self) -> None:
        bench = Bench(max_step_tokens=8)
        bench.add(prompt=40, new=1, priority=1)
        bench.step()
        bench.add(prompt=11, new=1, adapter=A)
        bench.step()
        assert bench.gate.asked == ["a"]

    def test_no_more_run_than_a_step_has_tokens(self) -> None:
        bench = Bench(max_step_tokens=4)
        for priority in range(8):
            bench.add(prompt=9, new=9, priority=-priority)
            assert len(bench.step().chunks) <= 4
            assert bench.scheduler.running <= 4
        bench.run_out()
        assert len(bench.finished) == 8
