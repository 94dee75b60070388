"""Whatever happens in a handler or on the wire, the client gets one status of the table, and no internals."""

import logging
import time
from collections.abc import Iterator
from random import Random
from statistics import median
from typing import Any

import grpc
import pytest

from chorus.admin.v1 import adapters_pb2
from chorus.engine.messages import Event, Submit, Tokens
from chorus.v1 import generate_pb2, inference_pb2_grpc, tasks_pb2
from services.fakes import FakeEngine, says
from services.harness import MakeRig, Rig, read_refusal, refused, until

GENERATE = "/chorus.v1.Inference/Generate"
SEED = generate_pb2.GenerateRequest(
    adapter="tenants/a/adapters/x", text="hello", sampling=generate_pb2.SamplingParams(temperature=0.5, stop=["a"])
).SerializeToString()


async def test_bug_in_a_streaming_handler_is_internal_with_an_id_and_no_text(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CHORUS_FAILPOINTS", "inference.generate=error")
    with caplog.at_level(logging.ERROR):
        seen = await refused(rig.generate())
    assert (seen.code, seen.reason) == ("INTERNAL", "INTERNAL")
    assert "failpoint" not in seen.message
    incident = seen.message.rsplit(" ", 1)[1]
    [record] = [record for record in caplog.records if incident in record.getMessage()]
    assert record.exc_info is not None
    assert "failpoint inference.generate" in str(record.exc_info[1])


async def test_stray_cancellation_ends_the_call_within_a_second(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHORUS_FAILPOINTS", "inference.generate=cancel")
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        assert (await refused(rig.generate())).code == "INTERNAL"
        seconds.append(time.monotonic() - began)
    assert median(seconds) < 1  # the machine may have stood still for one of them


async def test_bug_in_a_client_streaming_handler_is_internal_too(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHORUS_FAILPOINTS", "upload.received=error")
    seen = await refused(rig.publish())
    assert seen.code == "INTERNAL"
    assert "failpoint" not in seen.message


async def test_server_answers_after_bugs(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHORUS_FAILPOINTS", "inference.generate=error")
    await refused(rig.generate())
    monkeypatch.delenv("CHORUS_FAILPOINTS")
    assert await rig.generate()


@pytest.mark.parametrize(
    "data", [b"\xff\xff", b"\x0a\x02\xff\xfe", b"\x12\x05ab", b"\x2a\x7f", b"\x1a\x02\x08\x01\x80"]
)
async def test_bytes_that_are_no_request_are_invalid(rig: Rig, data: bytes) -> None:
    seen = await refused(read(raw(rig.channel)(data)))
    assert (seen.code, seen.reason) == ("INVALID_ARGUMENT", "MALFORMED_MESSAGE")
    unary: Any = rig.admin_channel.unary_unary("/chorus.admin.v1.Adapters/GetAdapter")
    assert (await refused(unary(b"\x0a\x02\xff\xfe"))).code == "INVALID_ARGUMENT"
    upload: Any = rig.admin_channel.stream_unary("/chorus.admin.v1.Adapters/CreateAdapterVersion")
    assert (await refused(upload(iter([b"\x0a\xff"])))).code == "INVALID_ARGUMENT"


async def test_mutated_requests_are_answered_or_refused_and_the_server_lives(rig: Rig) -> None:
    random = Random(0)
    method = raw(rig.channel)
    codes = set()
    for _ in range(500):
        data = bytearray(SEED)
        for _ in range(random.randint(1, 4)):
            data[random.randrange(len(data))] = random.randrange(256)
        try:
            await read(method(bytes(data[: random.randint(1, len(data))])))
        except grpc.aio.AioRpcError as error:
            codes.add(read_refusal(error).code)
    assert codes <= {"INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION"}
    assert await rig.generate()


async def test_message_over_the_limit_is_resource_exhausted(make_rig: MakeRig) -> None:
    rig = await make_rig(max_message_mb=1)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await rig.generate(text="a" * (2 << 20))
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_methods_that_are_not_built_say_so(rig: Rig) -> None:
    for call in (
        rig.inference.Classify(tasks_pb2.ClassifyRequest()),
        rig.inference.TagTokens(tasks_pb2.TagTokensRequest()),
        rig.inference.Answer(tasks_pb2.AnswerRequest()),
        rig.inference.Embed(tasks_pb2.EmbedRequest()),
        rig.admin.CreateTenant(adapters_pb2.CreateTenantRequest()),
        rig.admin.CreateApiKey(adapters_pb2.CreateApiKeyRequest()),
        rig.admin.RevokeApiKey(adapters_pb2.RevokeApiKeyRequest()),
        rig.admin.SetQuota(adapters_pb2.SetQuotaRequest()),
    ):
        seen = await refused(call)
        assert (seen.code, seen.reason) == ("UNIMPLEMENTED", "METHOD_NOT_BUILT")
        assert "not built yet" in seen.message


async def test_all_violations_arrive_as_one_bad_request(rig: Rig) -> None:
    params = generate_pb2.SamplingParams(temperature=-1, top_p=2, max_tokens=0)
    seen = await refused(rig.generate(sampling=params))
    assert (seen.code, seen.domain) == ("INVALID_ARGUMENT", "chorus")
    assert set(seen.fields) == {"sampling.temperature", "sampling.top_p", "sampling.max_tokens"}
    assert seen.fields["sampling.max_tokens"] == "must be between 1 and 512"


async def test_error_with_many_and_long_details_still_fits_the_trailers(rig: Rig) -> None:
    params = generate_pb2.SamplingParams(stop=[""] * 16, temperature=-1, stop_token_ids=[999])
    seen = await refused(rig.generate(sampling=params, request_id="é" * 5000))
    assert seen.code == "INVALID_ARGUMENT"
    assert 1 <= len(seen.fields) <= 8


async def test_reader_that_stops_loses_its_own_stream_only(make_rig: MakeRig) -> None:
    rig = await make_rig(stream_queue_tokens=4096, tokenizer=None)
    rig.engine.reply = floods
    # A fixed window: left to itself, HTTP/2 takes in megabytes before a server notices that nobody reads.
    options = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65535))
    prompt = generate_pb2.TokenIds(ids=[1])
    async with grpc.aio.insecure_channel(f"127.0.0.1:{rig.endpoints.port}", options=options) as channel:
        unread = inference_pb2_grpc.InferenceStub(channel).Generate(generate_pb2.GenerateRequest(token_ids=prompt))
        await until(lambda: bool(rig.engine.aborted), timeout_s=30)
        await until(lambda: rig.server.calls_under_way == 0)  # nothing is held for a reader that may never come back
        rig.engine.reply = says("still here")
        assert [t for m in await rig.generate(token_ids=prompt) for t in m.token_ids][:-1] == [*b"still here"]
        seen = await refused(read(unread))
    assert (seen.code, seen.reason) == ("RESOURCE_EXHAUSTED", "SLOW_READER")


async def test_reader_that_stops_holds_up_neither_a_deletion_nor_a_drain(make_rig: MakeRig) -> None:
    rig = await make_rig(stream_queue_tokens=4096, tokenizer=None, drain_grace_s=60.0)
    version = (await rig.publish("tenants/a/adapters/x")).version
    [folder] = rig.config.state_dir.glob(f"blobs/**/{version.digest}")
    rig.engine.reply = floods
    options = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65535))
    request = generate_pb2.GenerateRequest(adapter="tenants/a/adapters/x", token_ids=generate_pb2.TokenIds(ids=[1]))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{rig.endpoints.port}", options=options) as channel:
        unread = inference_pb2_grpc.InferenceStub(channel).Generate(request)
        await until(lambda: bool(rig.engine.aborted), timeout_s=30)
        await rig.admin.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name="tenants/a/adapters/x"))
        await until(lambda: not folder.exists())
        rig.server.drain_soon()
        began = time.monotonic()
        assert await rig.server.until_drained() == 0
        await rig.server.close()
        assert time.monotonic() - began < 10  # one second here
        with pytest.raises(grpc.aio.AioRpcError):
            await read(unread)


def floods(submit: Submit, engine: FakeEngine) -> Iterator[Event | float]:
    """More tokens than any buffer between here and a reader that does not read."""
    while submit.request_id not in engine.aborted:
        yield Tokens(submit.request_id, (200,) * 1024)
        yield 0.001


def raw(channel: grpc.aio.Channel) -> Any:
    """Generate without a serializer: bytes go out as they are."""
    return channel.unary_stream(GENERATE)


async def read(call: Any) -> list[Any]:
    return [message async for message in call]
