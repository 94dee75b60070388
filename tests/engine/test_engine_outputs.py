"""Several outputs of one request in a real engine; requests that only want their prompt computed."""

from typing import Any

import pytest
import torch

from chorus.engine import messages as m
from support.engines import make_engine, reference, run
from support.tiny import solo_logits
from support.worlds import PROMPT, TinyWorld

N, NEW = 4, 12
LONG = tuple(PROMPT * 3)[:30]  # seven full pages of four tokens, and two tokens more


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return TinyWorld(tmp_path_factory.mktemp("world"))


def asking(request_id: int, *, seed: int = 0, n: int = 1, prompt: tuple[int, ...] = LONG, **options: Any) -> m.Submit:
    adapter = options.pop("adapter", None)
    sampling = m.Sampling(**{"max_tokens": NEW, "temperature": 1.5, "ignore_eos": True, "seed": seed, **options})
    return m.Submit(request_id, prompt, sampling, adapter, n=n)


@pytest.mark.parametrize("name", ["", "r8"])
@pytest.mark.parametrize("kv_blocks", [128, 17], ids=["room", "preempted"])
def test_outputs_are_those_of_single_requests_with_the_seeds_that_follow(
    world: TinyWorld, name: str, kv_blocks: int
) -> None:
    adapter = reference(world.base, world.adapter(name)) if name else None
    singles = [asking(i, seed=2**64 - 2 + i if i < 2 else i - 2, adapter=adapter) for i in range(N)]
    expected = run(make_engine(world.base), {i: [single] for i, single in enumerate(singles)}).tokens
    assert len({tuple(tokens) for tokens in expected.values()}) == N, "the seeds make no difference"

    request = asking(0, seed=2**64 - 2, n=N, adapter=adapter)
    together = run(make_engine(world.base, kv_blocks=kv_blocks, max_step_tokens=10), {0: [request]})
    assert together.outputs == {(0, i): expected[i] for i in range(N)}
    assert (together.preemptions > 0) == (kv_blocks < 128)


def test_outputs_take_fewer_pages_than_single_requests(world: TinyWorld) -> None:
    together = run(make_engine(world.base, max_step_tokens=256), {0: [asking(0, n=N)]})
    singles = run(
        make_engine(world.base, max_step_tokens=256, prefix_cache=False), {0: [asking(i, seed=i) for i in range(N)]}
    )
    prompt_pages = (len(LONG) - 1) // 4
    assert singles.most_blocks - together.most_blocks >= (N - 1) * prompt_pages


def test_an_aborted_output_is_not_heard_of_again_and_the_others_go_on(world: TinyWorld) -> None:
    undisturbed = run(make_engine(world.base), {0: [asking(0, n=N)]})
    disturbed = run(make_engine(world.base), {0: [asking(0, n=N)], 5: [m.Abort(0, 1)]})
    assert 0 < len(disturbed.outputs.pop((0, 1))) < NEW
    assert disturbed.outputs == {(0, i): undisturbed.outputs[0, i] for i in (0, 2, 3)}


def test_a_request_of_several_outputs_starts_once_and_fails_once(world: TinyWorld) -> None:
    engine = make_engine(world.base, max_rows=2)
    late = m.Submit(0, LONG, m.Sampling(max_tokens=NEW), deadline=0.0, n=N)
    told = run(engine, {0: [asking(1, n=3)], 3: [late]}, may_fail=[0])
    assert [event.request_id for event in told.events if isinstance(event, m.Started)] == [1]
    assert told.failed[0].code == "DEADLINE_EXCEEDED"


def test_more_outputs_than_the_queue_has_room_for_are_refused_at_once(world: TinyWorld) -> None:
    engine = make_engine(world.base)
    step = engine.step([asking(1, n=250), asking(2, n=7)])
    [failed] = [event for event in step.events if isinstance(event, m.Failed)]
    assert (failed.request_id, failed.code, failed.reason) == (2, "RESOURCE_EXHAUSTED", "QUEUE_FULL")
    assert failed.retry_after_s


def prompt_logprobs(world: TinyWorld, name: str) -> list[float]:
    """What transformers and peft say of each token of `LONG` but the first."""
    scores = solo_logits(world.base, world.adapter(name) if name else None, list(LONG)).double().log_softmax(-1)
    return [float(scores[at, token]) for at, token in enumerate(LONG[1:])]


@pytest.mark.parametrize("name", ["", "r8"])
@pytest.mark.parametrize("first", [1, 20])
def test_a_prompt_alone_ends_with_its_log_probabilities_and_no_token(world: TinyWorld, name: str, first: int) -> None:
    adapter = reference(world.base, world.adapter(name)) if name else None
    scored = asking(0, max_tokens=0, prompt_logprobs=0, prompt_logprobs_from=first, adapter=adapter)
    told = run(make_engine(world.base, max_step_tokens=7), {0: [scored, asking(1), asking(2)]})
    mine = [event for event in told.events if getattr(event, "request_id", None) == 0]
    started, logprobs, end = mine
    assert isinstance(started, m.Started)
    assert isinstance(logprobs, m.PromptLogprobs)
    assert end == m.Tokens(0, (), m.FinishReason.LENGTH)
    expected = torch.tensor(prompt_logprobs(world, name)[first - 1 :])
    torch.testing.assert_close(torch.tensor([it.logprob for it in logprobs.logprobs]), expected, rtol=1e-5, atol=1e-5)


def test_log_probabilities_of_a_prompt_come_once_before_its_first_token_also_if_it_is_computed_twice(
    world: TinyWorld,
) -> None:
    """A decode takes the pages away again while the prompt is computed, token by token."""
    engine = make_engine(world.base, kv_blocks=11, max_step_tokens=2)
    decode = asking(1, prompt=LONG[:4], max_tokens=40)
    told = run(engine, {0: [decode], 3: [asking(2, n=2, max_tokens=3, prompt_logprobs=1, logprobs=0)]})
    assert told.preemptions > 0
    mine = [e for e in told.events if isinstance(e, m.PromptLogprobs | m.Tokens) and e.request_id == 2]
    first, *tokens = mine
    assert isinstance(first, m.PromptLogprobs)
    assert [isinstance(event, m.Tokens) and len(event.logprobs) for event in tokens] == [1] * 2 * 3
    found = torch.tensor([it.logprob for it in first.logprobs])
    torch.testing.assert_close(found, torch.tensor(prompt_logprobs(world, "")), rtol=1e-5, atol=1e-5)


def test_a_prompt_alone_may_fill_the_context(world: TinyWorld) -> None:
    whole = tuple(5 + i % 90 for i in range(256))
    told = run(make_engine(world.base), {0: [asking(0, prompt=whole, max_tokens=0)]})
    assert told.outputs == {(0, 0): []}
    step = make_engine(world.base).step([asking(0, prompt=(*whole, 5), max_tokens=0)])
    assert [event.code for event in step.events if isinstance(event, m.Failed)] == ["INVALID_ARGUMENT"]
