"""Fault 4: more than 10,000 requests that are no requests, on every method of both services, found by reflection.

A server process on the embedded base gets them as raw bytes. Each is answered, or refused with a status of the error
table and no internals; afterwards the server gives a known answer, holds nothing, and is no larger.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import grpc
import psutil
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from chorus.admin.v1 import adapters_pb2
from chorus.client import Client
from chorus.models import embedded
from chorus.v1 import generate_pb2, tasks_pb2
from faults.wild import messages, mutated
from support.claims import assert_solo_greedy, until
from support.server import ServerProcess
from support.tiny import save_adapter

SERVICES = ("chorus.v1.Inference", "chorus.admin.v1.Adapters")
INPUTS = 10_000
GENERATED, MUTATED = 120, 360  # for each method
BATCH = 8
# A refusal takes milliseconds; whoever waits as long as this hangs.
PATIENCE_S = 20.0
GROWTH_MB = 64
NOT_BUILT = {
    *("Classify", "TagTokens", "Answer", "Embed", "CreateTenant", "CreateApiKey", "RevokeApiKey", "SetQuota"),
}
TABLE = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "ABORTED", "RESOURCE_EXHAUSTED"}
INTERNALS = re.compile(r"Traceback|File \"|\.py\b|chorus\.|google\.protobuf|object at 0x|Error\(|Exception|/tmp|state/")
PROMPT = [5, 17, 300, 42, 999, 256, 77]
VICTIM, GOOD = "tenants/fuzz/adapters/victim", "tenants/good/adapters/good"


class Fuzzed:
    """The server under test, its methods, and what it has answered."""

    def __init__(self, server: ServerProcess, adapter: Path, channels: dict[str, grpc.Channel]) -> None:
        self.server = server
        self.process = psutil.Process(server.process.pid)
        self.adapter = adapter
        self.channels = channels
        self.methods: list[MethodDescriptor] = []
        for service, channel in channels.items():
            pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
            self.methods += pool.FindServiceByName(service).methods
        self.sent: Counter[str] = Counter()
        self.codes: Counter[str] = Counter()

    def send(self, method: MethodDescriptor, inputs: Sequence[bytes]) -> None:
        """Calls a method once for each input, or once with all of them where it takes a stream."""
        service = method.containing_service.full_name
        channel: Any = self.channels[service]
        path = f"/{service}/{method.name}"
        self.sent[method.full_name] += len(inputs)
        if method.client_streaming:
            self.check(method, inputs, lambda: channel.stream_unary(path)(iter(inputs), timeout=PATIENCE_S))
            return
        for data in inputs:
            self.check(method, [data], partial(self._call, channel, path, data, method.server_streaming))

    def _call(self, channel: Any, path: str, data: bytes, streams: bool) -> None:
        if streams:
            first(channel.unary_stream(path)(data, timeout=PATIENCE_S))
        else:
            channel.unary_unary(path)(data, timeout=PATIENCE_S)

    def check(self, method: MethodDescriptor, inputs: Sequence[bytes], call: Callable[[], Any]) -> None:
        try:
            call()
        except grpc.RpcError as error:
            refusal: Any = error
        else:
            self.codes["OK"] += 1
            return
        code, text = refusal.code().name, refusal.details() or ""
        self.codes[code] += 1
        told = f"{method.name} answers {code}: {text}\n{[data[:200] for data in inputs]}"
        assert code in TABLE or (code == "UNIMPLEMENTED" and method.name in NOT_BUILT), told
        assert not INTERNALS.search(text), told
        assert rpc_status.from_call(refusal) is not None, f"a bare code: {told}"

    def rss_mb(self) -> float:
        """Front end and engine together."""
        processes = (self.process, *self.process.children())
        return sum(float(process.memory_info().rss) for process in processes) / 2**20


def first(stream: Any) -> None:
    """Takes one message and goes away: what a wild request asks for may be long."""
    try:
        next(stream, None)
    finally:
        stream.cancel()


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzed]:
    folder = tmp_path_factory.mktemp("fuzz")
    adapter = save_adapter(embedded.path(), folder / "adapter", 3, r=1, target_modules=["q_proj"])
    options = ("--dtype", "float32", "--kv-cache-mb", "16", "--max-rank", "8")
    with (
        ServerProcess(folder / "state", *options) as server,
        server.channel() as public,
        server.channel(admin=True) as admin,
    ):
        with server.client() as client:
            client.push(adapter, tenant="good", name="good")
        yield Fuzzed(server, adapter, dict(zip(SERVICES, (public, admin), strict=True)))
        assert server.alive, "".join(server.log)
        assert not any("Traceback" in line for line in server.log), "".join(server.log)


def seeds(fuzzed: Fuzzed) -> dict[str, list[bytes]]:
    """Valid requests by method; a stream's are sent together."""
    sampling = generate_pb2.SamplingParams(
        max_tokens=2, temperature=0.5, top_k=3, top_p=0.9, seed=1, stop=["x"], stop_token_ids=[3], logprobs=1, n=2
    )
    sampling.logit_bias[7] = 1.5
    files = [(name, (fuzzed.adapter / name).read_bytes()) for name in sorted(FILES)]
    header = adapters_pb2.UploadHeader(
        parent=VICTIM, files=[adapters_pb2.UploadFile(name=name, size_bytes=len(data)) for name, data in files]
    )
    valid: dict[str, list[Any]] = {
        "Generate": [
            generate_pb2.GenerateRequest(adapter=VICTIM, text="Story:", sampling=sampling, request_id="r"),
            generate_pb2.GenerateRequest(token_ids=generate_pb2.TokenIds(ids=PROMPT), sampling=sampling, priority=3),
        ],
        "Score": [tasks_pb2.ScoreRequest(adapter=VICTIM, prompt="Story:", continuations=[" One", " Two"])],
        "Tokenize": [tasks_pb2.TokenizeRequest(text="Tom from Berlin", adapter=VICTIM)],
        "Detokenize": [tasks_pb2.DetokenizeRequest(token_ids=PROMPT)],
        "CreateAdapterVersion": [
            adapters_pb2.CreateAdapterVersionRequest(header=header),
            *(adapters_pb2.CreateAdapterVersionRequest(chunk=adapters_pb2.UploadChunk(data=data)) for _, data in files),
        ],
        "SetAlias": [adapters_pb2.SetAliasRequest(name=VICTIM, alias="canary", digest="0" * 64, etag="e")],
    }
    return {name: [message.SerializeToString() for message in known] for name, known in valid.items()}


FILES = ("adapter_config.json", "adapter_model.safetensors")


def seed_of(method: MethodDescriptor) -> bytes:
    """A plain request for methods that only take a name, a page or nothing."""
    message: Any = GetMessageClass(method.input_type)()
    for field in message.DESCRIPTOR.fields:
        if field.name in ("name", "parent", "adapter") and method.name not in NOT_BUILT:
            version = method.name.endswith("Version")
            setattr(message, field.name, VICTIM + (f"/versions/{'0' * 64}" if version else ""))
        elif field.name in ("page_size",):
            message.page_size = 10
    return bytes(message.SerializeToString())


def harmless(method: MethodDescriptor, data: bytes) -> bool:
    """A well-formed Drain would end the test, and nothing else."""
    if method.name != "Drain":
        return True
    try:
        request = adapters_pb2.DrainRequest.FromString(data)
    except DecodeError:
        return True
    return request.HasField("grace") and not 0 <= request.grace.ToNanoseconds() / 1e9 <= 86_400


def send_generated(fuzzed: Fuzzed, method: MethodDescriptor) -> None:
    known = seeds(fuzzed).get(method.name) or [seed_of(method)]
    # On the wire a later field wins: a valid request with two wild fields behind it gets further than wild ones alone.
    nearly = st.builds(bytes.__add__, st.sampled_from(known), messages(method.input_type, most=2))

    @settings(
        max_examples=GENERATED // BATCH,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(messages(method.input_type) | nearly, min_size=BATCH, max_size=BATCH))
    def send(inputs: list[bytes]) -> None:
        fuzzed.send(method, [data for data in inputs if harmless(method, data)])

    send()


def send_mutated(fuzzed: Fuzzed, method: MethodDescriptor) -> None:
    random = Random(method.full_name)
    known = seeds(fuzzed).get(method.name) or [seed_of(method)]
    for _ in range(MUTATED // len(known) if method.client_streaming else MUTATED):
        if method.client_streaming:
            inputs = list(known)
            spoiled = random.choice((0, 0, *range(len(inputs))))
            inputs[spoiled] = mutated(random, inputs[spoiled])
            fuzzed.send(method, inputs[: random.choice((1, len(inputs), len(inputs)))])
        else:
            data = mutated(random, random.choice(known))
            if harmless(method, data):
                fuzzed.send(method, [data])


def push_victim(fuzzed: Fuzzed) -> None:
    """The adapter that the requests name; they may well delete it."""
    with fuzzed.server.client() as client:
        client.push(fuzzed.adapter, tenant="fuzz", name="victim")


def residency(client: Client) -> tuple[int, int]:
    """KV blocks and references that anybody holds."""
    found = client.residency()
    return found.totals.kv_blocks_used, sum(version.refs for version in found.versions)


def test_wild_requests_are_answered_or_refused_and_leave_nothing(fuzzed: Fuzzed) -> None:
    assert {method.containing_service.full_name for method in fuzzed.methods} == set(SERVICES)
    assert any(method.client_streaming for method in fuzzed.methods)
    push_victim(fuzzed)
    for method in fuzzed.methods:
        send_generated(fuzzed, method)
    half_way = fuzzed.rss_mb()
    push_victim(fuzzed)
    for method in fuzzed.methods:
        send_mutated(fuzzed, method)
    grown = fuzzed.rss_mb() - half_way
    print(json.dumps({"sent": fuzzed.sent, "codes": fuzzed.codes, "grown_mb": round(grown, 1)}))

    assert len(fuzzed.sent) == len(fuzzed.methods)
    assert fuzzed.sent.total() >= INPUTS
    assert min(fuzzed.sent.values()) >= 200, fuzzed.sent
    assert grown < GROWTH_MB
    assert fuzzed.codes["OK"] > 100, "nearly nothing got past the first check: most was not tested"
    with fuzzed.server.client() as client:
        until(lambda: residency(client) == (0, 0), "pages and references are back")
        for name, folder in (("", None), (GOOD, fuzzed.adapter)):
            answer = client.generate(PROMPT, adapter=name, max_tokens=12, temperature=0, ignore_eos=True)
            assert_solo_greedy(embedded.path(), folder, PROMPT, answer.token_ids)
    now = fuzzed.server.scrape()
    for gauge in ("requests_running", "requests_waiting", "requests_waiting_for_adapter", "kv_cache_usage_ratio"):
        assert now.value(f"chorus_{gauge}") == 0, gauge
