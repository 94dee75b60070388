"""Steps that overlap: the same tokens, ends and failures as without, in the time of the device alone."""

from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from chorus.engine import engine as engine_room
from chorus.engine import evaluate as evaluate_room
from chorus.engine import flight as flight_room
from chorus.engine import messages as m
from chorus.engine.evaluate import Launched, launch
from chorus.engine.layout import Layout
from chorus.engine.readback import Readback
from chorus.engine.runner import Runner
from chorus.engine.sampler import draw
from support.engines import Run, hold, make_engine, reference, run
from support.tape import READS
from support.tiny import VOCAB
from support.worlds import PROMPT, TinyWorld

KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.3},
    {"temperature": 1.3, "min_p": 0.02},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.9},
    {"temperature": 1.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"temperature": 1.0, "min_tokens": 5},
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 1.0, "prompt_logprobs": 1},
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return TinyWorld(tmp_path_factory.mktemp("world"))


class Trace:
    """Random requests with their arrivals: several tenants' beginnings, adapters, outputs, ways to draw and to end."""

    def __init__(self, world: TinyWorld, seed: int, kinds: list[dict[str, Any]]) -> None:
        random = Random(seed)
        folders = [world.adapter("r8"), world.adapter("r4", r=4)]
        self.adapters = [None, *(reference(world.base, folder) for folder in folders)]
        self.arrivals: dict[int, list[m.Command]] = {0: []}
        self.disturbed: set[int] = set()
        """Who is aborted or has a deadline: how far they come depends on time."""
        for request_id in range(14):
            beginning = PROMPT[: random.choice([0, 8, 12])] if random.random() < 0.5 else []
            own = [random.randrange(3, 90) for _ in range(random.randrange(1, 30))]
            stops = frozenset(random.sample(range(3, VOCAB), 12)) if random.random() < 0.5 else frozenset()
            sampling = m.Sampling(
                random.choice([1, 2, 9, 30]), seed=request_id, stop_token_ids=stops, **random.choice(kinds)
            )
            deadline = 0.0 if random.random() < 0.1 else None
            prompt, n = (*beginning, *own), random.choice([1, 1, 1, 3])
            adapter, priority = random.choice(self.adapters), random.choice([0, 0, 1])
            submit = m.Submit(request_id, prompt, sampling, adapter, priority, deadline, n)
            at = random.randrange(40)
            self.arrivals.setdefault(at, []).append(submit)
            if random.random() < 0.2:
                index = random.choice([None, 0])
                self.arrivals.setdefault(at + random.randrange(1, 12), []).append(m.Abort(request_id, index))
                self.disturbed.add(request_id)
            if deadline is not None:
                self.disturbed.add(request_id)

    def run(self, world: TinyWorld, **limits: Any) -> Run:
        engine = make_engine(world.base, **limits)
        hold(engine, self.adapters)
        told = run(engine, self.arrivals, may_fail=self.disturbed)
        while engine.has_work:
            engine.step([])
        assert engine.blocks.usage == 0
        assert engine.scheduler.running == 0
        return told


def ends(told: Run) -> dict[tuple[int, int], m.FinishReason]:
    return {(e.request_id, e.index): e.finish for e in told.events if isinstance(e, m.Tokens) and e.finish}


def logprobs(told: Run, request_id: int) -> list[Any]:
    found = [
        e.logprobs for e in told.events if isinstance(e, m.Tokens | m.PromptLogprobs) and e.request_id == request_id
    ]
    return [pytest.approx(entry.logprob, abs=1e-4) for entries in found for entry in entries]


@pytest.mark.parametrize("kinds", [KINDS[:4], KINDS], ids=["plain", "all"])
@pytest.mark.parametrize("limits", [{}, {"kv_blocks": 26}, {"max_rows": 3}], ids=["room", "few pages", "few rows"])
@pytest.mark.parametrize("seed", range(2))
def test_tokens_ends_and_failures_are_those_of_steps_one_after_the_other(
    world: TinyWorld, seed: int, limits: dict[str, int], kinds: list[dict[str, Any]]
) -> None:
    trace = Trace(world, seed, kinds)
    expected, got = trace.run(world, **limits), trace.run(world, overlap=True, **limits)
    assert {key for key in expected.outputs if key[0] not in trace.disturbed} == {
        key for key in got.outputs if key[0] not in trace.disturbed
    }
    for key, tokens in got.outputs.items():
        if key[0] in trace.disturbed:
            longest = max(tokens, expected.outputs.get(key, []), key=len)
            assert longest[: len(tokens)] == tokens
            continue
        assert tokens == expected.outputs[key]
        assert ends(got)[key] == ends(expected)[key]
        assert logprobs(got, key[0]) == logprobs(expected, key[0])
    assert got.failed.keys() == expected.failed.keys()


PLAIN = m.Sampling(30, temperature=1.2, seed=3, ignore_eos=True)
GUILTY_AT = 20


def together(count: int = 4) -> dict[int, list[m.Command]]:
    """Requests whose prompts end in one step; number 1 alone comes to position GUILTY_AT and further."""
    lengths = [12 if i == 1 else 5 for i in range(count)]
    sampling = [m.Sampling(30 if i == 1 else 12, temperature=1.2, seed=i, ignore_eos=True) for i in range(count)]
    prompts = [tuple((PROMPT * 2)[i : i + length]) for i, length in enumerate(lengths)]
    return {0: [m.Submit(i, prompt, sampling[i]) for i, prompt in enumerate(prompts)]}


@pytest.mark.parametrize("times", [1, 1000], ids=["once", "always"])
def test_a_step_that_can_not_be_launched_behind_another_costs_the_guilty_alone(
    world: TinyWorld, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    expected = run(make_engine(world.base, max_step_tokens=64), together())
    forward, failures, behind = Runner.forward, [0], [False]

    def failing(self: Runner, layout: Layout, drawn: Any = None) -> Any:
        if GUILTY_AT in layout.positions and failures[0] < times:
            behind[0] |= not failures[0] and drawn is not None
            failures[0] += 1
            raise RuntimeError("shapes do not match")
        return forward(self, layout, drawn)

    monkeypatch.setattr(Runner, "forward", failing)
    told = run(make_engine(world.base, max_step_tokens=64, overlap=True), together(), may_fail=[1])
    assert behind == [True]
    assert set(told.failed) == (set() if times == 1 else {1})
    for key, tokens in expected.outputs.items():
        assert told.outputs[key] == tokens[: len(told.outputs[key])]
        assert len(told.outputs[key]) == (GUILTY_AT + 1 - 12 if key[0] in told.failed else len(tokens))


def test_who_has_a_row_that_is_not_finite_fails_and_the_row_behind_it_is_nobodys(
    world: TinyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(make_engine(world.base, max_step_tokens=64), together())
    forward, launches = Runner.forward, [0, 0]

    def broken(self: Runner, layout: Layout, drawn: Any = None) -> Any:
        launches[0] += 1
        logits = forward(self, layout, drawn)
        launches[1] += 1
        for row, position in enumerate(layout.positions):
            if position >= GUILTY_AT:
                logits[row] = torch.nan
        return logits

    monkeypatch.setattr(Runner, "forward", broken)
    engine = make_engine(world.base, max_step_tokens=64, overlap=True)
    told = run(engine, together(), may_fail=[1])
    assert {request_id: event.reason for request_id, event in told.failed.items()} == {1: "NOT_FINITE"}
    assert launches[0] == launches[1], "what can not be looked up ends a GPU"
    del expected.outputs[1, 0], told.outputs[1, 0]
    assert told.outputs == expected.outputs
    while engine.has_work:
        engine.step([])
    assert engine.blocks.usage == 0


def test_the_row_behind_an_output_that_has_ended_costs_the_others_of_its_request_nothing(
    world: TinyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if it is not finite."""
    sampling = m.Sampling(20, temperature=1.2, seed=3, ignore_eos=True)
    plain = run(make_engine(world.base), {0: [m.Submit(0, tuple(PROMPT), sampling, n=2)]}).outputs
    first, second = plain[0, 0], plain[0, 1]
    last = next(i for i in range(2, 20) if first[i] not in first[:i] + second)
    stopping = m.Sampling(20, temperature=1.2, seed=3, ignore_eos=True, stop_token_ids=frozenset({first[last]}))
    forward, behind = Runner.forward, [0]

    def broken(self: Runner, layout: Layout, drawn: Any = None) -> Any:
        logits = forward(self, layout, drawn)
        for row, chunk in enumerate(layout.sampled):
            if chunk.seq.index == 0 and chunk.start == len(PROMPT) + last:
                logits[row] = torch.nan
                behind[0] += 1
        return logits

    monkeypatch.setattr(Runner, "forward", broken)
    told = run(make_engine(world.base, overlap=True), {0: [m.Submit(0, tuple(PROMPT), stopping, n=2)]})
    assert behind == [1]
    assert told.outputs == {(0, 0): first[: last + 1], (0, 1): second}


def test_a_device_that_is_lost_behind_a_step_ends_the_engine(world: TinyWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Runner.forward

    def losing(self: Runner, layout: Layout, drawn: Any = None) -> Any:
        if drawn is not None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return forward(self, layout, drawn)

    monkeypatch.setattr(Runner, "forward", losing)
    with pytest.raises(RuntimeError, match="CUDA error"):
        run(make_engine(world.base, max_step_tokens=64, overlap=True), together())


class Device:
    """A device on simulated time, for which a launch takes `HOST` seconds, and a step STEP seconds from then on.

    What is launched while it computes begins when that is done. Who reads tokens has to wait for them.
    """

    HOST, STEP = 3.0, 8.0

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.done = 1.0
        device = self

        class Late(Readback[int]):
            def __init__(self, tensor: torch.Tensor) -> None:
                super().__init__(tensor)
                device.now += device.HOST
                self.done = device.done = max(device.done, device.now) + device.STEP

            def read(self) -> list[int]:
                device.now = max(device.now, self.done)
                return super().read()

        monkeypatch.setattr(evaluate_room, "Readback", Late)
        for room in (engine_room, flight_room):
            monkeypatch.setattr(room, "time", SimpleNamespace(monotonic=lambda: device.now))


@pytest.mark.parametrize(("overlap", "seconds"), [(False, Device.HOST + Device.STEP), (True, Device.STEP)])
def test_steps_that_overlap_take_the_time_of_the_device_alone(
    world: TinyWorld, monkeypatch: pytest.MonkeyPatch, overlap: bool, seconds: float
) -> None:
    device = Device(monkeypatch)
    engine = make_engine(world.base, max_step_tokens=64, overlap=overlap)
    observed: list[tuple[int, float]] = []
    monkeypatch.setattr(engine.scheduler.cost, "observe", lambda work, took: observed.append((work.tokens, took)))
    submits: list[m.Command] = [m.Submit(i, tuple(PROMPT), PLAIN) for i in range(4)]
    turns = [engine.step(submits if number == 0 else []) for number in range(20)]
    steady = [turn for turn in turns if turn.ran][2:]
    assert {turn.stats.seconds for turn in steady} == {seconds}
    assert {turn.stats.rows for turn in steady} == {turn.stats.generated_tokens for turn in steady} == {4}
    assert device.now == pytest.approx(20 * seconds, abs=2 * (Device.HOST + Device.STEP))
    assert observed[2:] == [(4, seconds)] * (len(observed) - 2)


class NoReads(TorchDispatchMode):
    """Refuses what a device would have to be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith(READS):
            raise RuntimeError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def test_drawing_behind_another_step_looks_at_nothing_on_the_device(
    world: TinyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = [0, 0]

    def watched(*arguments: Any) -> torch.Tensor:
        behind = arguments[-1] is not None
        drawn[behind] += 1
        if not behind:
            return draw(*arguments)
        with NoReads():  # type: ignore[no-untyped-call]
            return draw(*arguments)

    monkeypatch.setattr(evaluate_room, "draw", watched)
    told = run(make_engine(world.base, max_step_tokens=64, overlap=True), together())
    assert not told.failed
    assert drawn == [1, 29]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_whatever_way_a_row_draws_its_steps_overlap(
    world: TinyWorld, monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any]
) -> None:
    launched = [0, 0]

    def counted(*arguments: Any) -> Launched:
        launched[arguments[-1] is not None] += 1
        return launch(*arguments)

    monkeypatch.setattr(engine_room, "launch", counted)
    sampling = m.Sampling(20, seed=1, ignore_eos=True, **kind)
    run(make_engine(world.base, max_step_tokens=64, overlap=True), {0: [m.Submit(0, tuple(PROMPT), sampling)]})
    assert launched == [1, 19]
