"""The parts of a step add up to the step, and every part of the engine's own path is among them."""

import time

import pytest

from chorus.engine import graphs
from chorus.engine import messages as m
from chorus.kernels.native.tape import Tapes
from step_profile import StepProfile
from support.engines import make_engine, reference
from support.worlds import PROMPT, TinyWorld


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return TinyWorld(tmp_path_factory.mktemp("world"))


def test_the_parts_of_a_step_add_up_to_the_step(world: TinyWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one that would be replayed from a tape, too."""
    monkeypatch.setattr(graphs, "SEEN_BEFORE", 0)
    engine = make_engine(world.base, record=Tapes())
    adapter = reference(world.base, world.adapter("r8"))
    request = m.Submit(0, tuple(PROMPT), m.Sampling(12, temperature=0.0, ignore_eos=True), adapter)
    with StepProfile() as profile:
        engine.step([request])
        while not engine.has_work:
            time.sleep(0.01)
            engine.step([])
        for _ in range(4):  # recorded by then
            engine.step([])
        profile.take()
        began = time.perf_counter()
        engine.step([])
        seconds = time.perf_counter() - began
        parts = profile.take()
    assert set(parts) <= set(profile.names)
    assert all(spent > 0 for spent in parts.values())
    assert {"linears", "deltas", "attention"} <= set(parts)
    assert sum(parts.values()) == pytest.approx(seconds, rel=0.05)
    engine.close()


def test_after_a_profile_the_engine_is_as_it_was(world: TinyWorld) -> None:
    with StepProfile() as profile:
        pass
    engine = make_engine(world.base)
    engine.step([m.Submit(0, tuple(PROMPT), m.Sampling(2))])
    assert profile.take() == {}
    engine.close()
