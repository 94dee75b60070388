"""Generate over a real port: what a client gets, and what the engine is told."""

import asyncio
import time
from collections.abc import Iterator

import grpc
import pytest

from chorus.engine.messages import Abort, Event, Failed, FinishReason, Started, Submit, Tokens
from chorus.v1 import generate_pb2
from services.fakes import EOS, FakeEngine, interleaved, never_ends, says, says_to, silent
from services.harness import MakeRig, Rig, refused, until


async def test_text_tokens_usage_and_timing_of_a_whole_answer(rig: Rig) -> None:
    rig.engine.reply = says("hi", pause_s=0.01)
    messages = await rig.generate(text="abc")
    assert "".join(m.text for m in messages) == "hi"
    assert [t for m in messages for t in m.token_ids] == [*b"hi", EOS]
    last = messages[-1]
    assert last.finish_reason == generate_pb2.FINISH_REASON_STOP
    assert (last.usage.prompt_tokens, last.usage.cached_tokens, last.usage.completion_tokens) == (3, 0, 3)
    timing = last.timing
    assert 0 < timing.queue.ToNanoseconds() <= timing.first_token.ToNanoseconds() < timing.total.ToNanoseconds()
    assert all(m.finish_reason == generate_pb2.FINISH_REASON_UNSPECIFIED for m in messages[:-1])


async def test_cached_tokens_are_told_and_counted(rig: Rig) -> None:
    def reply(submit: Submit, engine: FakeEngine) -> Iterator[Event | float]:
        yield Started(submit.request_id, time.monotonic(), 0.0, cached_tokens=2)
        yield Tokens(submit.request_id, (EOS,), FinishReason.STOP)

    rig.engine.reply = reply
    messages = await rig.generate(text="abc")
    assert messages[-1].usage.cached_tokens == 2
    counted = rig.server.metrics.registry.get_sample_value("chorus_cached_prompt_tokens_total")
    assert counted == 2


@pytest.mark.parametrize(
    ("tenant", "adapter", "salt"),
    [("", "", ""), ("acme", "", "acme"), ("", "tenants/a/adapters/x", "a"), ("acme", "tenants/a/adapters/x", "a")],
)
async def test_a_request_is_salted_with_its_tenant(rig: Rig, tenant: str, adapter: str, salt: str) -> None:
    await rig.publish("tenants/a/adapters/x")
    rig.engine.reply = says("hi")
    metadata = (("chorus-tenant", tenant),) if tenant else ()
    request = generate_pb2.GenerateRequest(text="abc", adapter=adapter)
    async for _ in rig.inference.Generate(request, metadata=metadata):
        pass
    assert [command.salt for command in rig.engine.commands if isinstance(command, Submit)] == [salt]


async def test_tokens_that_are_ready_together_come_in_one_message(rig: Rig) -> None:
    messages: list[generate_pb2.GenerateResponse] = []

    def reply(submit: Submit, engine: FakeEngine) -> Iterator[Event | float]:
        yield Started(submit.request_id, time.monotonic(), 0.0)
        engine.post(*(Tokens(submit.request_id, (byte,)) for byte in b"first"))
        while not messages:
            yield 0.001
        engine.post(*(Tokens(submit.request_id, (byte,)) for byte in b" then all"))
        yield Tokens(submit.request_id, (EOS,), FinishReason.STOP)

    rig.engine.reply = reply
    await rig.hear(messages)
    assert messages[0].text == "first"
    assert len(messages) <= 3
    assert "".join(m.text for m in messages) == "first then all"


async def test_first_message_comes_with_the_first_token(rig: Rig) -> None:
    rig.engine.reply = never_ends
    call = rig.inference.Generate(generate_pb2.GenerateRequest(text="x"))
    first = await asyncio.wait_for(anext(aiter(call)), 5)
    assert first.text.startswith("x")
    call.cancel()


async def test_characters_split_over_tokens_arrive_whole(rig: Rig) -> None:
    text = "größe 日本 🙂!"
    messages: list[generate_pb2.GenerateResponse] = []
    rig.engine.reply = says_to(messages, text)
    await rig.hear(messages)
    assert "".join(m.text for m in messages) == text
    assert all("�" not in m.text for m in messages)
    assert len(messages) == len(text.encode()) + 1


async def test_stop_string_ends_the_stream_and_aborts_the_engine(rig: Rig) -> None:
    rig.engine.reply = interleaved("one STOP two", then_endless=[0])
    messages = await rig.generate(sampling=generate_pb2.SamplingParams(stop=["STOP"], max_tokens=100))
    assert "".join(m.text for m in messages) == "one "
    assert messages[-1].finish_reason == generate_pb2.FINISH_REASON_STOP_STRING
    assert messages[-1].usage.completion_tokens == len("one STOP")
    assert sum(len(m.token_ids) for m in messages) == len("one STOP")
    [submit] = rig.engine.sent(Submit)
    assert isinstance(submit, Submit)
    assert rig.engine.has_aborted(submit.request_id)


async def test_token_that_ends_the_answer_has_no_text(rig: Rig) -> None:
    def reply(submit: Submit, engine: FakeEngine) -> Iterator[Event | float]:
        yield Started(submit.request_id, time.monotonic(), 0.0)
        yield Tokens(submit.request_id, (ord("a"),))
        yield Tokens(submit.request_id, (ord("!"),), FinishReason.STOP)

    rig.engine.reply = reply
    messages = await rig.generate(sampling=generate_pb2.SamplingParams(stop_token_ids=[ord("!")]))
    assert "".join(m.text for m in messages) == "a"
    assert [t for m in messages for t in m.token_ids] == [*b"a!"]
    assert messages[-1].usage.completion_tokens == 2


async def test_running_into_the_limit_is_told(rig: Rig) -> None:
    rig.engine.reply = says("cut", finish=FinishReason.LENGTH)
    messages = await rig.generate()
    assert messages[-1].finish_reason == generate_pb2.FINISH_REASON_LENGTH
    assert messages[-1].usage.completion_tokens == 3


async def test_cancelled_call_is_aborted_in_the_engine(rig: Rig) -> None:
    rig.engine.reply = never_ends
    call = rig.inference.Generate(generate_pb2.GenerateRequest(text="x"))
    await anext(aiter(call))
    call.cancel()
    await until(lambda: bool(rig.engine.sent(Abort)))


async def test_call_cancelled_before_its_first_token_is_aborted_too(rig: Rig) -> None:
    rig.engine.reply = silent
    call = rig.inference.Generate(generate_pb2.GenerateRequest(text="x"))
    await until(lambda: bool(rig.engine.sent(Submit)))
    call.cancel()
    await until(lambda: bool(rig.engine.sent(Abort)))


async def test_deadline_reaches_the_engine_and_ends_the_call(rig: Rig) -> None:
    heard_at: list[float] = []

    def reply(submit: Submit, engine: FakeEngine) -> Iterator[Event | float]:
        heard_at.append(time.monotonic())
        return iter(())

    rig.engine.reply = reply
    began = time.monotonic()
    with pytest.raises(grpc.aio.AioRpcError) as error:
        async for _ in rig.inference.Generate(generate_pb2.GenerateRequest(text="x"), timeout=1.0):
            pass
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    submit = rig.engine.sent(Submit)[0]
    assert isinstance(submit, Submit)
    assert submit.deadline is not None
    # A second after the server had the call, which was at some time between these two.
    assert began + 1.0 - 0.1 < submit.deadline < heard_at[0] + 1.0 + 0.1
    await until(lambda: bool(rig.engine.sent(Abort)))


async def test_without_a_deadline_the_engine_gets_none(rig: Rig) -> None:
    call = rig.inference.Generate(generate_pb2.GenerateRequest(text="x"))
    assert [m async for m in call]
    submit = rig.engine.sent(Submit)[0]
    assert isinstance(submit, Submit)
    assert submit.deadline is None


async def test_engine_error_reaches_the_client_with_its_details(rig: Rig) -> None:
    def reply(submit: Submit, engine: FakeEngine) -> Iterator[Event | float]:
        yield Failed(submit.request_id, "RESOURCE_EXHAUSTED", "QUEUE_FULL", "the queue is full", 2.5)

    rig.engine.reply = reply
    seen = await refused(rig.generate())
    assert (seen.code, seen.reason, seen.domain) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL", "chorus")
    assert seen.message == "the queue is full"
    assert seen.retry_after_s == 2.5


async def test_adapter_version_is_named_in_metadata_and_in_first_and_last_message(rig: Rig) -> None:
    version = (await rig.publish("tenants/a/adapters/x")).version
    rig.engine.reply = says("some words", pause_s=0.002)
    call = rig.inference.Generate(generate_pb2.GenerateRequest(text="x", adapter="tenants/a/adapters/x"))
    messages = [message async for message in call]
    assert messages[0].adapter_version == messages[-1].adapter_version == version.name
    assert (await call.initial_metadata()).get("chorus-adapter-version") == version.name
    assert (await call.trailing_metadata()).get("chorus-adapter-version") == version.name
    submit = rig.engine.sent(Submit)[0]
    assert isinstance(submit, Submit)
    assert submit.adapter is not None
    assert submit.adapter.digest == version.digest


@pytest.mark.parametrize(
    "name",
    [
        "tenants/a/adapters/none",
        "tenants/b/adapters/x",
        "tenants/a/adapters/x@other",
        f"tenants/a/adapters/x/versions/{'1' * 64}",
    ],
)
async def test_unknown_adapter_is_never_answered_by_the_base(rig: Rig, name: str) -> None:
    await rig.publish("tenants/a/adapters/x")
    seen = await refused(rig.generate(adapter=name))
    assert (seen.code, seen.reason, seen.message) == (
        "NOT_FOUND",
        "ADAPTER_NOT_FOUND",
        "no such adapter, alias or version",
    )
    assert not rig.engine.sent(Submit)


async def test_adapter_without_live_version_is_a_failed_precondition(rig: Rig) -> None:
    await rig.publish("tenants/a/adapters/x", alias="canary")
    seen = await refused(rig.generate(adapter="tenants/a/adapters/x"))
    assert seen.reason == "NO_LIVE_VERSION"
    assert await rig.generate(adapter="tenants/a/adapters/x@canary")


@pytest.mark.parametrize(
    "name", ["../x", "tenants/a/adapters/x\0", "tenants/A/adapters/x", "a" * 10_000, "t\u0435nants/a/adapters/x"]
)
async def test_names_that_are_none_are_refused(rig: Rig, name: str) -> None:
    seen = await refused(rig.generate(adapter=name))
    assert seen.code == "INVALID_ARGUMENT"
    assert list(seen.fields) == ["adapter"]
    assert len(seen.message) < 600


async def test_base_without_tokenizer_takes_and_gives_token_ids(make_rig: MakeRig) -> None:
    rig = await make_rig(tokenizer=None)
    seen = await refused(rig.generate(text="words"))
    assert seen.reason == "NO_TOKENIZER"
    call = rig.inference.Generate(generate_pb2.GenerateRequest(token_ids=generate_pb2.TokenIds(ids=[1, 2])))
    messages = [message async for message in call]
    assert [t for m in messages for t in m.token_ids] == [*b"ok", EOS]
    assert all(m.text == "" for m in messages)


async def test_long_text_is_refused_with_the_limit(rig: Rig) -> None:
    for text in ("a" * 512, "a" * 100_000, "b" * 2_000_000):
        seen = await refused(rig.generate(text=text))
        assert (seen.code, seen.reason) == ("INVALID_ARGUMENT", "PROMPT_TOO_LONG")
        assert "512" in seen.message


async def test_max_tokens_is_limited_by_what_the_prompt_leaves(rig: Rig) -> None:
    await rig.generate(text="a" * 500, sampling=generate_pb2.SamplingParams(max_tokens=100))
    submit = rig.engine.sent(Submit)[0]
    assert isinstance(submit, Submit)
    assert submit.sampling.max_tokens == 12
