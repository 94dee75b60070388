"""Score over a real port: what the engine is asked, and how its answers come back."""

from collections.abc import Iterator

import grpc
import pytest

from chorus.admin.v1 import adapters_pb2
from chorus.engine.messages import Abort, Event, Failed, FinishReason, PromptLogprobs, Submit, TokenLogprob, Tokens
from chorus.v1 import generate_pb2, tasks_pb2
from services.fakes import FakeEngine, silent
from services.harness import MakeRig, Rig, refused, until


def scores(submit: Submit, engine: FakeEngine) -> Iterator[Event | float]:
    """The log-probability of token t is -t."""
    wanted = submit.prompt[submit.sampling.prompt_logprobs_from :]
    yield PromptLogprobs(submit.request_id, tuple(TokenLogprob(-float(token)) for token in wanted))
    yield Tokens(submit.request_id, (), FinishReason.LENGTH)


@pytest.fixture
async def rig(make_rig: MakeRig) -> Rig:
    rig = await make_rig()
    rig.engine.reply = scores
    return rig


def ids(*lists: list[int]) -> list[generate_pb2.TokenIds]:
    return [generate_pb2.TokenIds(ids=each) for each in lists]


def submits(rig: Rig) -> list[Submit]:
    return [command for command in rig.engine.sent(Submit) if isinstance(command, Submit)]


async def test_each_continuation_has_its_tokens_and_their_logprobs_in_order(rig: Rig) -> None:
    response = await rig.inference.Score(tasks_pb2.ScoreRequest(prompt="abc", continuations=["xy", "z", "hello"]))
    assert [list(score.token_ids) for score in response.scores] == [[*b"xy"], [*b"z"], [*b"hello"]]
    for score in response.scores:
        assert list(score.token_logprobs) == [-float(token) for token in score.token_ids]
        assert score.logprob == sum(score.token_logprobs)


async def test_engine_computes_prompt_and_continuation_and_generates_nothing(rig: Rig) -> None:
    await rig.inference.Score(tasks_pb2.ScoreRequest(prompt_token_ids=[7, 8], continuation_token_ids=ids([1], [2, 3])))
    assert sorted(submit.prompt for submit in submits(rig)) == [(7, 8, 1), (7, 8, 2, 3)]
    for submit in submits(rig):
        sampling = submit.sampling
        assert (sampling.max_tokens, sampling.prompt_logprobs, sampling.prompt_logprobs_from) == (0, 0, 2)


async def test_all_continuations_are_under_way_together(rig: Rig) -> None:
    rig.engine.reply = silent
    call = rig.inference.Score(tasks_pb2.ScoreRequest(prompt="a", continuations=["b"] * 128))
    await until(lambda: len(submits(rig)) == 128)
    call.cancel()
    await until(lambda: len(rig.engine.aborted) == 128)


async def test_failure_of_one_ends_the_others(rig: Rig) -> None:
    def reply(submit: Submit, engine: FakeEngine) -> Iterator[Event | float]:
        if submit.prompt[-1] == ord("!"):
            yield 0.05
            yield Failed(submit.request_id, "RESOURCE_EXHAUSTED", "QUEUE_FULL", "the queue is full", 1.0)

    rig.engine.reply = reply
    seen = await refused(rig.inference.Score(tasks_pb2.ScoreRequest(prompt="a", continuations=["b", "!", "c"])))
    assert (seen.code, seen.reason, seen.retry_after_s) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL", 1.0)
    await until(lambda: len(rig.engine.sent(Abort)) == 2)


async def test_version_that_scored_is_named(rig: Rig) -> None:
    version = (await rig.publish("tenants/a/adapters/x")).version
    request = tasks_pb2.ScoreRequest(adapter="tenants/a/adapters/x", prompt="a", continuations=["b"])
    call = rig.inference.Score(request)
    assert (await call).adapter_version == version.name
    assert (await call.initial_metadata()).get("chorus-adapter-version") == version.name
    assert [submit.adapter.digest for submit in submits(rig) if submit.adapter] == [version.digest]


async def test_unknown_adapter_scores_nothing(rig: Rig) -> None:
    request = tasks_pb2.ScoreRequest(adapter="tenants/a/adapters/none", prompt="a", continuations=["b"])
    assert (await refused(rig.inference.Score(request))).code == "NOT_FOUND"
    assert not submits(rig)


async def test_deadline_reaches_the_engine_and_ends_the_call(rig: Rig) -> None:
    rig.engine.reply = silent
    request = tasks_pb2.ScoreRequest(prompt="a", continuations=["b"])
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await rig.inference.Score(request, timeout=1.0)
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert submits(rig)[0].deadline is not None
    await until(lambda: bool(rig.engine.sent(Abort)))


async def test_prompt_and_continuation_may_fill_the_context_and_not_more(rig: Rig) -> None:
    request = tasks_pb2.ScoreRequest(prompt="a" * 500, continuations=["b" * 12])
    assert len((await rig.inference.Score(request)).scores[0].token_ids) == 12
    request.continuations.append("b" * 13)
    seen = await refused(rig.inference.Score(request))
    assert (seen.code, seen.reason, list(seen.fields)) == (
        "INVALID_ARGUMENT",
        "PROMPT_TOO_LONG",
        ["continuations[1]"],
    )
    assert "512" in seen.message


async def test_text_and_ids_together_are_refused(rig: Rig) -> None:
    request = tasks_pb2.ScoreRequest(prompt="a", continuations=["b"], prompt_token_ids=[1])
    assert (await refused(rig.inference.Score(request))).code == "INVALID_ARGUMENT"


async def test_base_without_tokenizer_scores_ids(make_rig: MakeRig) -> None:
    rig = await make_rig(tokenizer=None)
    rig.engine.reply = scores
    seen = await refused(rig.inference.Score(tasks_pb2.ScoreRequest(prompt="a", continuations=["b"])))
    assert seen.reason == "NO_TOKENIZER"
    request = tasks_pb2.ScoreRequest(prompt_token_ids=[1], continuation_token_ids=ids([5, 6]))
    assert (await rig.inference.Score(request)).scores[0].logprob == -11


async def test_adapter_is_held_while_it_scores_and_not_longer(rig: Rig) -> None:
    version = (await rig.publish("tenants/a/adapters/x", alias="")).version
    rig.engine.reply = silent
    call = rig.inference.Score(tasks_pb2.ScoreRequest(adapter=version.name, prompt="a", continuations=["b"]))
    await until(lambda: bool(submits(rig)))
    [folder] = rig.config.state_dir.glob(f"blobs/**/{version.digest}")
    await rig.admin.DeleteVersion(adapters_pb2.DeleteVersionRequest(name=version.name))
    assert folder.exists()
    call.cancel()
    await until(lambda: not folder.exists())
