"""Traffic in simulated time: who must not notice whom, and that everybody is served in the end."""

import random
from collections import Counter

import pytest

from chorus.engine.kv_cache import BlockPool
from chorus.engine.messages import AdapterRef, Sampling
from chorus.engine.scheduler import Scheduler
from chorus.engine.sequence import Sequence
from chorus.engine.simulated_device import Cost, StepFeatures
from chorus.engine.simulation import Limits, SimulatedRequest, Simulation
from support.gates import LoadingGate

STEP = 0.01
COST = Cost(StepFeatures(STEP, 0, 0, 0, 0, 0, 0))
ADAPTERS = [AdapterRef(digest, f"/{digest}") for digest in "abc"]


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


def traffic(seed: int) -> list[SimulatedRequest]:
    """Urgent requests, a few at a time, in the middle of ten times as many as rows and pages take."""
    rng = random.Random(seed)
    urgent = [SimulatedRequest(rng.uniform(0, 8), rng.randint(1, 40), rng.randint(1, 20)) for _ in range(40)]
    others = [
        SimulatedRequest(rng.uniform(0, 6), rng.randint(1, 40), rng.randint(1, 24), priority=rng.randint(1, 3))
        for _ in range(400)
    ]
    return sorted([*urgent, *others], key=lambda request: request.at)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("rows", "blocks"), [(4, 400), (64, 24)], ids=["rows are short", "pages are short"])
def test_urgent_requests_do_not_notice_those_that_are_less_important(seed: int, rows: int, blocks: int) -> None:
    """They may arrive in the middle of a step, which takes none; nothing else keeps them longer than being alone."""
    limits = Limits(blocks, 0, block_size=4, max_rows=rows, max_step_tokens=256, context_length=64)
    everybody = traffic(seed)
    alone = [request for request in everybody if request.priority == 0]
    report = Simulation(limits, COST, check=True).run(everybody)
    among_others = [answer for answer in report.answers if answer.request.priority == 0]
    for mine, theirs in zip(Simulation(limits, COST).run(alone).answers, among_others, strict=True):
        assert theirs.finished is not None
        assert mine.finished is not None
        assert theirs.finished <= mine.finished + STEP * 1.001
    assert report.preemptions > 20
    assert all(answer.finished is not None for answer in report.answers)


@pytest.mark.parametrize("seed", range(4))
def test_preemptions_are_as_many_as_urgent_requests_need_rows_at_most(seed: int) -> None:
    limits = Limits(400, 0, block_size=4, max_rows=4, max_step_tokens=256, context_length=64)
    requests = traffic(seed)
    report = Simulation(limits, COST).run(requests)
    # Each of another priority than the last needs a row at most, and gives it back when it ends or is preempted itself.
    assert 0 < report.preemptions <= sum(request.priority < 3 for request in requests) * 3
    computed = sum(request.prompt + request.new - 1 for request in requests)
    assert report.computed <= 1.25 * computed
