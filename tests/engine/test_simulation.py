"""The real scheduler and residency on simulated time: nobody starves, nothing leaks, times are what the costs say."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chorus.engine.simulated_device import Cost, SimulatedAdapter, StepFeatures
from chorus.engine.simulation import Limits, Report, SimulatedRequest, Simulation

STEP = 0.01
COST = Cost(StepFeatures(STEP, 0, 0, 0, 0.001, 0, 0), load=0.5, overhead=0.002)
SMALL = Limits(kv_blocks=24, adapter_bytes=20, block_size=4, max_rows=4, max_step_tokens=16, context_length=64)


def adapter(i: int, size: int = 10) -> SimulatedAdapter:
    return SimulatedAdapter(f"a{i}", size)


def run(requests: list[SimulatedRequest], limits: Limits = SMALL, cost: Cost = COST) -> Report:
    return Simulation(limits, cost, check=True).run(requests)


def test_a_request_alone_takes_what_its_steps_cost() -> None:
    report = run([SimulatedRequest(at=1.0, prompt=10, new=5)])
    assert report.answers[0].first_token == pytest.approx(1.0 + STEP + 10 * 0.001 + 0.002)
    assert report.answers[0].finished == pytest.approx(1.0 + 5 * STEP + 10 * 0.001 + 0.002)
    assert (report.answers[0].tokens, report.steps) == (5, 5)


def test_a_prompt_longer_than_a_step_takes_several() -> None:
    assert run([SimulatedRequest(0.0, prompt=40, new=1)]).steps == 3


def test_a_burst_that_begins_alike_computes_its_beginning_once() -> None:
    limits = Limits(kv_blocks=64, adapter_bytes=20, block_size=4, max_rows=8, max_step_tokens=128, context_length=64)
    burst = [SimulatedRequest(0.0, prompt=20, new=1, shared=16) for _ in range(6)]
    report = run(burst, limits)
    assert (report.computed, report.steps) == (20 + 5 * 4, 2)
    apart = run([replace(request, shared=0) for request in burst], limits)
    assert apart.computed == 6 * 20
    assert report.seconds < apart.seconds


def test_an_adapter_costs_its_load_once_while_it_stays() -> None:
    requests = [SimulatedRequest(at, 4, 2, adapter(0)) for at in (0.0, 2.0)]
    cold, hot = run(requests).answers
    assert cold.first_token is not None
    assert cold.first_token >= 0.5
    assert cold.waited_for_adapter
    assert hot.first_token == pytest.approx(2.0 + STEP + 4 * 0.001 + 0.002)
    assert not hot.waited_for_adapter


def test_the_adapter_that_was_used_last_stays() -> None:
    order = [0, 1, 0, 2, 0, 1]  # two fit: 2 takes the place of 1, not of 0
    report = run([SimulatedRequest(3.0 * i, 4, 2, adapter(which)) for i, which in enumerate(order)])
    assert [answer.waited_for_adapter for answer in report.answers] == [True, True, False, True, False, True]
    assert (report.loads, report.evictions) == (4, 2)


def test_what_comes_from_host_memory_takes_no_load() -> None:
    order = [0, 1, 2, 0]  # two fit on the device, and all in host memory
    limits = replace(SMALL, adapter_host_bytes=30)
    requests = [SimulatedRequest(3.0 * i, 4, 2, adapter(which)) for i, which in enumerate(order)]
    report = run(requests, limits)
    assert (report.loads, report.from_host) == (4, 1)
    again = report.answers[-1]
    assert again.first_token == pytest.approx(9.0 + STEP + 4 * 0.001 + 0.002)
    read = run(requests).answers[-1].first_token
    assert read is not None
    assert read >= 9.5


def test_others_run_while_an_adapter_loads() -> None:
    loading, base = run([SimulatedRequest(0.0, 4, 2, adapter(0)), SimulatedRequest(0.0, 4, 20)]).answers
    assert base.finished is not None
    assert loading.first_token is not None
    assert base.finished < loading.first_token


def test_two_loaders_take_three_loads_in_two_rounds() -> None:
    limits = Limits(kv_blocks=64, adapter_bytes=100, block_size=4, max_rows=4)
    times = [a.first_token for a in run([SimulatedRequest(0.0, 4, 1, adapter(i)) for i in range(3)], limits).answers]
    assert [round(time or 0.0, 1) for time in times] == [0.5, 0.5, 1.0]


def test_a_full_queue_refuses_and_an_adapter_that_never_fits_fails() -> None:
    limits = Limits(kv_blocks=24, adapter_bytes=20, block_size=4, max_rows=1, context_length=64, max_queue=1)
    report = run(
        [*(SimulatedRequest(0.0, 4, 4) for _ in range(3)), SimulatedRequest(5.0, 4, 4, adapter(0, 21))], limits
    )
    assert [answer.error for answer in report.answers] == [
        None, "RESOURCE_EXHAUSTED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION",
    ]  # fmt: skip


REQUEST = st.tuples(
    st.floats(0, 3), st.integers(1, 40), st.integers(1, 20), st.one_of(st.none(), st.integers(0, 6)), st.integers(-1, 1)
)


@settings(max_examples=40, deadline=None)
@given(st.lists(REQUEST, min_size=1, max_size=40), st.sampled_from([0.0, 0.03, 0.5]))
def test_whatever_the_trace_everybody_gets_all_tokens_and_nothing_is_kept(
    drawn: list[tuple[float, int, int, int | None, int]], load: float
) -> None:
    requests = sorted(
        (
            SimulatedRequest(at, prompt, new, None if which is None else adapter(which), priority)
            for at, prompt, new, which, priority in drawn
        ),
        key=lambda request: request.at,
    )
    report = run(requests, cost=Cost(COST.step, load=load))
    assert all(answer.error is None for answer in report.answers)
    assert [answer.tokens for answer in report.answers] == [request.new for request in requests]
    for answer in report.answers:
        assert answer.first_token is not None
        assert answer.finished is not None
        assert answer.request.at < answer.first_token <= answer.finished <= report.seconds + 1e-9
    assert report.loads - report.evictions <= 2, "more is resident than fits"


@pytest.mark.parametrize("noisy", [0, 2])
def test_under_overload_by_many_adapters_the_rare_one_is_served_in_bounded_time(noisy: int) -> None:
    generator = random.Random(noisy)
    traffic = [SimulatedRequest(i * 0.02, 8, 8, adapter(generator.randrange(noisy + 2))) for i in range(600)]
    rare = SimulatedRequest(2.0, 8, 8, adapter(9))
    requests = sorted([*traffic, rare], key=lambda request: request.at)
    report = run(requests, Limits(64, 20, block_size=4, max_rows=4, context_length=64))
    answer = report.answers[requests.index(rare)]
    before = sum(request.at <= 2.0 for request in requests)
    assert answer.finished is not None
    # All that came before it, and the adapters' turns on the device.
    assert answer.finished < 2.0 + before * 8 * STEP + 10 * 0.5 + 5.0


def test_the_first_step_of_a_size_takes_longer_once() -> None:
    cost = Cost(COST.step, new_size=0.1)
    simulation = Simulation(SMALL, cost, check=True)
    first, second = (simulation.run([SimulatedRequest(0.0, prompt=10, new=3)]).seconds for _ in range(2))
    assert first == pytest.approx(3 * STEP + 10 * 0.001 + 2 * 0.1)  # of 10 tokens, and of 1
    assert second == pytest.approx(3 * STEP + 10 * 0.001)


def test_a_second_run_finds_the_adapters_of_the_first() -> None:
    simulation = Simulation(SMALL, COST, check=True)
    requests = [SimulatedRequest(0.0, 4, 2, adapter(0))]
    assert [simulation.run(requests).answers[0].waited_for_adapter for _ in range(2)] == [True, False]
