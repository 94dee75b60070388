"""Prompts that begin alike in a real engine: the tokens are those of a cache that knows nothing yet."""

from typing import Any

import pytest

from chorus import failpoints
from chorus.engine import messages as m
from chorus.engine.engine import Engine
from support.claims import assert_solo_greedy
from support.engines import make_engine, reference, run
from support.worlds import PROMPT, TinyWorld

SYSTEM = tuple(PROMPT * 4)[:38]
QUESTIONS = [(5, 9), (61, 62, 63, 64, 65), (8,), (71, 9, 72)]
POISON = 95
NEW = 14


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return TinyWorld(tmp_path_factory.mktemp("world"))


def asking(request_id: int, question: tuple[int, ...], **options: Any) -> m.Submit:
    adapter, salt = options.pop("adapter", None), options.pop("salt", "")
    sampling = m.Sampling(**{"max_tokens": NEW, "temperature": 0.0, "ignore_eos": True, **options})
    return m.Submit(request_id, SYSTEM + question, sampling, adapter, salt=salt)


def cached(events: list[m.Event]) -> list[int]:
    return [event.cached_tokens for event in events if isinstance(event, m.Started)]


@pytest.mark.parametrize("name", ["", "r8"])
@pytest.mark.parametrize("kv_blocks", [128, 24], ids=["room", "preempted"])
def test_tokens_behind_a_prompt_that_is_found_are_those_of_a_solo_run(
    world: TinyWorld, name: str, kv_blocks: int
) -> None:
    """In chunks of ten tokens. In the small cache pages are evicted, and preempted sequences find some of their own."""
    folder = world.adapter(name) if name else None
    adapter = reference(world.base, folder) if folder else None
    engine = make_engine(world.base, kv_blocks=kv_blocks, max_step_tokens=10)
    first = run(engine, {0: [asking(0, QUESTIONS[0], adapter=adapter)]})
    others = [asking(i, question, adapter=adapter) for i, question in enumerate(QUESTIONS)]
    told = run(engine, {0: list(others)})
    assert cached(first.events) == [0]
    assert cached(told.events)[0] == 36
    assert (told.preemptions > 0) == (kv_blocks < 128)
    for i, question in enumerate(QUESTIONS):
        assert_solo_greedy(world.base, folder, [*SYSTEM, *question], told.tokens[i])
    assert told.tokens[0] == first.tokens[0]


def test_tenants_and_versions_find_their_own_only(world: TinyWorld) -> None:
    engine = make_engine(world.base)
    r8, r4 = (reference(world.base, world.adapter(name, r=r)) for name, r in (("r8", 8), ("r4", 4)))
    who: list[dict[str, Any]] = [{}, {"salt": "t"}, {"adapter": r8}, {"adapter": r8, "salt": "t"}, {"adapter": r4}]
    for expected in (0, 36):
        for i, whose in enumerate(who):
            assert cached(run(engine, {0: [asking(i, (5, 9), **whose)]}).events) == [expected]


def test_an_engine_told_not_to_finds_nothing_of_other_requests(world: TinyWorld) -> None:
    engine = make_engine(world.base, prefix_cache=False)
    assert [cached(run(engine, {0: [asking(i, (5, 9))]}).events) for i in range(2)] == [[0], [0]]


def test_log_probabilities_of_a_prompt_are_the_same_where_its_beginning_is_found(world: TinyWorld) -> None:
    def told(engine: Engine, request_id: int) -> tuple[list[float], list[int]]:
        asked = asking(request_id, QUESTIONS[1], prompt_logprobs=0, prompt_logprobs_from=len(SYSTEM), max_tokens=0)
        events = run(engine, {0: [asked]}).events
        [logprobs] = [event.logprobs for event in events if isinstance(event, m.PromptLogprobs)]
        return [entry.logprob for entry in logprobs], cached(events)

    engine = make_engine(world.base)
    (fresh, nothing), (again, found) = told(engine, 1), told(engine, 2)
    assert (len(again), nothing, found) == (len(QUESTIONS[1]), [0], [36])
    assert again == pytest.approx(fresh, abs=1e-5)


def test_pages_of_a_step_that_failed_are_not_found(world: TinyWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, f"engine.forward=error@{POISON}")
    engine = make_engine(world.base, max_step_tokens=10)
    run(engine, {0: [asking(1, (POISON,))]}, may_fail=[1])
    told = run(engine, {0: [asking(2, (5, 9))]})
    assert cached(told.events) == [0]
    assert_solo_greedy(world.base, None, [*SYSTEM, 5, 9], told.tokens[2])


def test_pages_of_a_prompt_that_was_aborted_are_found_as_far_as_it_came(world: TinyWorld) -> None:
    engine = make_engine(world.base, max_step_tokens=10)
    run(engine, {0: [asking(1, (5, 9))], 2: [m.Abort(1)]})
    told = run(engine, {0: [asking(2, (5, 9))]})
    assert cached(told.events) == [20]
    assert_solo_greedy(world.base, None, [*SYSTEM, 5, 9], told.tokens[2])
