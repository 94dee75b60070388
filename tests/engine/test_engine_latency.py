"""A bound on steps with streams in a real engine, which learns from its own steps what they cost."""

import time
from pathlib import Path

import pytest

from chorus.engine import messages as m
from chorus.engine.step_cost import Work
from support.claims import assert_solo_greedy
from support.engines import make_engine, run
from support.worlds import PROMPT, TinyWorld

LONG = tuple(PROMPT * 6)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TinyWorld(tmp_path_factory.mktemp("world")).base


def asking(request_id: int, prompt: tuple[int, ...], new: int) -> m.Submit:
    return m.Submit(request_id, prompt, m.Sampling(new, temperature=0.0, ignore_eos=True))


@pytest.mark.parametrize(("target_s", "most"), [(1e-6, 4), (60.0, 23)], ids=["tight", "wide"])
def test_prompts_take_what_the_bound_leaves_beside_a_stream(base: Path, target_s: float, most: int) -> None:
    """A page of four tokens where it leaves nothing, all tokens of the step but the stream's where it leaves much."""
    engine = make_engine(base, target_step_s=target_s)
    for number in range(3):
        engine.step([asking(1, tuple(PROMPT), 100)] if number == 0 else [])
    taken = [engine.step([asking(2, LONG, 4)] if number == 0 else []).stats.prompt_tokens for number in range(2)]
    assert taken == [most] * 2


def test_tokens_do_not_depend_on_how_a_prompt_was_split(base: Path) -> None:
    told = run(make_engine(base, target_step_s=1e-6), {0: [asking(1, tuple(PROMPT), 40)], 2: [asking(2, LONG, 12)]})
    assert_solo_greedy(base, None, LONG, told.tokens[2])
    assert_solo_greedy(base, None, PROMPT, told.tokens[1])


def test_a_deadline_that_the_prompt_can_not_meet_is_refused_at_once(base: Path) -> None:
    engine = make_engine(base)
    for work, seconds in ((Work(1, 1), 0.01), (Work(64, 2080), 0.64)):  # this model's own are too short to tell apart
        engine.scheduler.cost.observe(work, seconds)
    late = m.Submit(2, tuple(reversed(LONG)), m.Sampling(4), deadline=time.monotonic() + 1e-4)
    [failed] = [event for event in engine.step([late]).events if isinstance(event, m.Failed)]
    assert (failed.request_id, failed.code) == (2, "DEADLINE_EXCEEDED")
    assert engine.scheduler.waiting == 0


@pytest.mark.parametrize("overlap", [False, True])
def test_before_a_turn_computes_somebody_hears_whether_prompts_are_in_it(base: Path, overlap: bool) -> None:
    """A prompt takes three turns beside a stream. Nobody hears of turns without work, or where they overlap."""
    engine, heard = make_engine(base, overlap=overlap), list[bool]()
    engine.before_computing = heard.append
    for commands in ([], [asking(1, tuple(PROMPT), 100)], [], [asking(2, LONG, 1)], [], [], [], [], [m.Abort(1)]):
        engine.step(commands)
    assert heard == ([] if overlap else [True, False, True, True, True, False, False])
