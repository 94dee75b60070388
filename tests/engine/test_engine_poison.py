"""A request that makes the forward pass fail costs itself; its neighbours get the tokens that they get alone."""

from pathlib import Path

import pytest

from chorus import failpoints
from chorus.engine import messages as m
from support.claims import assert_solo_greedy
from support.engines import make_engine, reference, run
from support.tiny import VOCAB
from support.worlds import PROMPT, TinyWorld

POISON = 95
OUTSIDE = VOCAB + 5  # not in the vocabulary: the embedding itself raises
GREEDY = m.Sampling(max_tokens=16, temperature=0.0, ignore_eos=True)
NEIGHBOURS = {1: "", 2: "r8", 3: "r4", 4: "", 5: "r8"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return TinyWorld(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def folders(world: TinyWorld) -> dict[str, Path | None]:
    return {"": None, "r8": world.adapter("r8"), "r4": world.adapter("r4", r=4)}


def neighbours(world: TinyWorld, folders: dict[str, Path | None]) -> list[m.Command]:
    commands: list[m.Command] = []
    for request_id, name in NEIGHBOURS.items():
        folder = folders[name]
        adapter = reference(world.base, folder) if folder else None
        commands.append(m.Submit(request_id, tuple(PROMPT[request_id:]), GREEDY, adapter))
    return commands


def check_neighbours(world: TinyWorld, folders: dict[str, Path | None], told: dict[int, list[int]]) -> None:
    for request_id, name in NEIGHBOURS.items():
        assert len(told[request_id]) == 16
        assert POISON not in told[request_id], "a neighbour is poisoned too: nothing was tested"
        assert_solo_greedy(world.base, folders[name], PROMPT[request_id:], told[request_id])


def poisoned(request_id: int, token: int, n: int = 1) -> m.Submit:
    return m.Submit(request_id, (*PROMPT, token, *PROMPT), GREEDY, n=n)


@pytest.mark.parametrize(("action", "code"), [("error", "INTERNAL"), ("memory", "RESOURCE_EXHAUSTED")])
def test_poison_costs_only_the_guilty(
    world: TinyWorld, folders: dict[str, Path | None], monkeypatch: pytest.MonkeyPatch, action: str, code: str
) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, f"engine.forward={action}@{POISON}")
    engine = make_engine(world.base)
    guilty: dict[int, list[m.Command]] = {3: [poisoned(8, POISON)], 9: [poisoned(9, POISON), poisoned(10, POISON, n=3)]}
    told = run(engine, {0: neighbours(world, folders), **guilty}, may_fail=[8, 9, 10])
    check_neighbours(world, folders, told.tokens)
    assert {request_id: event.code for request_id, event in told.failed.items()} == {8: code, 9: code, 10: code}
    assert {event.retry_after_s for event in told.failed.values()} == {1.0 if action == "memory" else None}
    assert engine.blocks.usage == 0


def test_an_error_of_the_model_itself_costs_only_the_guilty(world: TinyWorld, folders: dict[str, Path | None]) -> None:
    told = run(make_engine(world.base), {0: neighbours(world, folders), 3: [poisoned(8, OUTSIDE)]}, may_fail=[8])
    check_neighbours(world, folders, told.tokens)
    assert told.failed[8].code == "INTERNAL"


def test_a_prompts_log_probabilities_are_told_once_beside_poison(
    world: TinyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, f"engine.forward=error@{POISON}")
    scored = m.Submit(1, tuple(PROMPT), m.Sampling(max_tokens=2, temperature=0.0, prompt_logprobs=0))
    clean = run(make_engine(world.base), {0: [scored]})
    beside = run(make_engine(world.base, max_step_tokens=64), {0: [scored, poisoned(8, POISON)]}, may_fail=[8])
    [expected] = [event for event in clean.events if isinstance(event, m.PromptLogprobs)]
    [found] = [event for event in beside.events if isinstance(event, m.PromptLogprobs)]
    assert [it.logprob for it in found.logprobs] == pytest.approx([it.logprob for it in expected.logprobs], abs=1e-5)


def test_a_lost_device_ends_the_engine(world: TinyWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, f"engine.forward=device@{POISON}")
    engine = make_engine(world.base)
    assert engine.step([m.Submit(1, tuple(PROMPT), GREEDY)]).ran
    with pytest.raises(RuntimeError, match="CUDA error"):
        engine.step([poisoned(8, POISON)])
