"""Planning with the simulator, and the fit of its costs."""

import json
import random
import sys
import time
from argparse import Namespace

import pytest

import simulator
from chorus.engine.simulated_device import StepFeatures
from loads.calibration import fit

TRACE = "--rate 20 --hours 0.01 --adapters 300 --alpha 0.6 --cv 2 --input 8 64 --output 4 16 --seconds 1 --threads 1"
SERVER = '--resident 8 --max-rows 16 --kv-tokens 4096 --json --cost {"step":[0.004,0,0,0,0,0,0],"load":0.02}'


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> Namespace:
    monkeypatch.setattr(sys, "argv", ["simulator.py", *TRACE.split(), *SERVER.split()])
    return simulator.parse()


def test_a_plan_tells_latencies_and_how_often_adapters_are_missing(arguments: Namespace) -> None:
    row = simulator.plan(arguments)
    assert (row["requests"], row["completed"], row["errors"]) == (720, 720, {})
    assert row["loads"] > 300  # 8 of 300 stay
    assert 0.3 < row["waited_for_adapter"] < 1
    assert row["first_token_p50"] > 0.02
    assert json.dumps(row)


def test_prompts_that_begin_alike_are_computed_from_where_they_part(arguments: Namespace) -> None:
    apart = simulator.plan(arguments)
    arguments.shared = 32
    assert simulator.plan(arguments)["computed_tokens"] < apart["computed_tokens"]


def test_a_trace_of_ten_thousand_adapters_is_replayed_faster_than_it_lasts(arguments: Namespace) -> None:
    arguments.adapters, arguments.resident, arguments.hours, arguments.rate = 10_000, 128, 0.02, 5.0
    began = time.perf_counter()
    row = simulator.plan(arguments)
    assert row["completed"] == 360
    assert time.perf_counter() - began < 72 / 4


def test_a_fit_finds_the_costs_that_made_the_times() -> None:
    costs = StepFeatures(0.004, 0.001, 0.0002, 0.0003, 0.00005, 0.0, 0.002)
    generator = random.Random(1)
    features = []
    for _ in range(200):
        rows, adapters = generator.randrange(1, 64), generator.randrange(0, 8)
        prefills = generator.randrange(0, 3)
        adapted = min(adapters, 1)
        tokens = prefills * generator.randrange(20, 100)
        features.append(StepFeatures(1, adapted, rows, adapters, tokens, prefills, prefills * adapted))
    seconds = [sum(a * b for a, b in zip(costs, row, strict=True)) for row in features]
    assert list(fit(features, seconds)) == pytest.approx(list(costs), abs=1e-7)


def test_a_fit_has_no_negative_costs() -> None:
    generator = random.Random(2)
    features = [StepFeatures(1, 0, rows, 0, 0, 0, 0) for rows in range(1, 65)]
    seconds = [0.01 - 0.0001 * row.rows + generator.uniform(0, 1e-4) for row in features]
    assert min(fit(features, seconds)) >= 0


@pytest.mark.parametrize("text", ['{"step": [1, 2]}', '{"steps": []}', "{"])
def test_what_is_no_cost_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        simulator.cost_of(text)
