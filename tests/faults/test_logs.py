"""What the server logs: JSON lines with the call's id, its end and its counts, and never what a caller has written."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from chorus.admin.v1 import adapters_pb2, adapters_pb2_grpc
from chorus.models import embedded
from chorus.v1 import generate_pb2, inference_pb2, inference_pb2_grpc, tasks_pb2
from support.claims import until
from support.server import READY, ServerProcess
from support.tiny import save_adapter
from support.worlds import CONFIG, TENSORS

# Told apart by a number each, and by nothing that the server could say by itself.
CANARY = "qvxzcanary"
POISON = 1279  # a token: steps that hold it fail
KEYS = {"time", "level", "logger", "message"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    state = tmp_path_factory.mktemp("logs") / "state"
    options = ("--log-format", "json", "--log-level", "debug", "--kv-cache-mb", "16")
    with ServerProcess(state, *options, failpoints=f"engine.forward=error@{POISON}") as server:
        yield server
        assert server.alive


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(embedded.path(), tmp_path_factory.mktemp("adapter"), 3, r=2, target_modules=["q_proj"])


def lines(server: ServerProcess) -> list[dict[str, Any]]:
    """All that was logged; one line is for scripts that wait for the start."""
    return [json.loads(line) for line in server.log if not READY.match(line.strip())]


def ended(logged: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in logged if line["logger"] == "chorus.access" and line["method"].startswith("/chorus.")]


def end_of(server: ServerProcess, request_id: str) -> dict[str, Any]:
    """The line that tells how a call ended, once it is there; what is logged before it has the id too."""

    def found() -> list[dict[str, Any]]:
        return [line for line in ended(lines(server)) if line["request_id"] == request_id]

    until(lambda: bool(found()), "the call's end is logged")
    [end] = found()
    return end


def metadata_of(call: Any) -> dict[str, str]:
    return {key: value for key, value in call.trailing_metadata() or () if isinstance(value, str)}


def test_end_of_a_call_is_one_line_with_its_id_version_and_counts(server: ServerProcess, adapter: Path) -> None:
    with server.client() as client, server.channel() as channel:
        pushed = client.push(adapter, tenant="acme", name="support")
        request = generate_pb2.GenerateRequest(
            adapter="tenants/acme/adapters/support",
            token_ids=generate_pb2.TokenIds(ids=[5, 6, 7]),
            sampling=generate_pb2.SamplingParams(max_tokens=4, ignore_eos=True),
            request_id="order 7",
        )
        call: Any = inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=20)
        list(call)
        assert metadata_of(call)["chorus-request-id"] == "order 7"
    end = end_of(server, "order 7")
    assert end.keys() >= KEYS
    assert (end["level"], end["code"], end["method"]) == ("info", "OK", "/chorus.v1.Inference/Generate")
    assert (end["tenant"], end["adapter_version"]) == ("acme", pushed.digest)
    assert (end["prompt_tokens"], end["completion_tokens"]) == (3, 4)
    assert 0 < end["first_token_ms"] <= end["duration_ms"] < 20_000


def test_refused_call_gets_an_id_that_the_log_has_too(server: ServerProcess) -> None:
    with server.channel() as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(generate_pb2.GenerateRequest(adapter="tenants/a/adapters/b", text="x"), timeout=20))
    request_id = metadata_of(caught.value)["chorus-request-id"]
    end = end_of(server, request_id)
    assert (end["code"], end["reason"]) == ("NOT_FOUND", "ADAPTER_NOT_FOUND")


def test_each_call_gets_an_id_of_its_own(server: ServerProcess) -> None:
    with server.channel() as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        ids = set()
        for _ in range(3):
            _, call = stub.GetModel.with_call(inference_pb2.GetModelRequest(), timeout=20)
            ids.add(metadata_of(call)["chorus-request-id"])
    assert len(ids) == 3


def canaries(channel: Any, admin: Any, adapter: Path) -> list[Callable[[], Any]]:
    """Calls that carry the canary wherever a caller can write: prompts, names, files, metadata."""
    stub, operator = inference_pb2_grpc.InferenceStub(channel), adapters_pb2_grpc.AdaptersStub(admin)

    def generate(metadata: Any = None, **fields: Any) -> Any:
        sampling = generate_pb2.SamplingParams(max_tokens=2, **fields.pop("sampling", {}))
        request = generate_pb2.GenerateRequest(sampling=sampling, **fields)
        return list(stub.Generate(request, timeout=20, metadata=metadata))

    def push(name: str, content: bytes) -> Any:
        files = {CONFIG: (adapter / CONFIG).read_bytes(), TENSORS: (adapter / TENSORS).read_bytes(), name: content}
        header = adapters_pb2.UploadHeader(parent="tenants/acme/adapters/spoiled")
        for each, data in files.items():
            header.files.add(name=each, size_bytes=len(data))
        chunks = [adapters_pb2.UploadChunk(data=data) for data in files.values()]
        parts = [adapters_pb2.CreateAdapterVersionRequest(chunk=chunk) for chunk in chunks]
        return operator.CreateAdapterVersion(
            iter([adapters_pb2.CreateAdapterVersionRequest(header=header), *parts]), timeout=20
        )

    config = json.loads((adapter / CONFIG).read_text())
    dialogue = generate_pb2.Messages(messages=[generate_pb2.Message(role="user", content=CANARY)])
    strange = generate_pb2.Messages(messages=[generate_pb2.Message(role=CANARY, content=CANARY)])
    poisoned = generate_pb2.TokenIds(ids=[5, POISON])
    return [
        lambda: generate(text=CANARY),
        lambda: generate(text=CANARY, sampling={"stop": [CANARY]}),
        lambda: generate(text=CANARY * 10_000),
        lambda: generate(text=CANARY, sampling={"temperature": -1}),
        lambda: generate(messages=dialogue),
        lambda: generate(messages=strange),
        lambda: generate(token_ids=poisoned, sampling={"stop": [CANARY]}),
        lambda: generate(text=CANARY, adapter=f"tenants/{CANARY}!/adapters/x"),
        lambda: generate(text=CANARY, adapter=f"tenants/a/adapters/x@{CANARY.upper()}"),
        lambda: generate(text=CANARY, request_id=CANARY + "\n"),
        lambda: generate(text=CANARY, metadata=(("chorus-tenant", f"{CANARY}!"),)),
        lambda: generate(text=CANARY, metadata=(("authorization", f"Bearer {CANARY}"),)),
        lambda: stub.Tokenize(tasks_pb2.TokenizeRequest(text=CANARY), timeout=20),
        lambda: stub.Score(tasks_pb2.ScoreRequest(prompt=CANARY, continuations=[CANARY]), timeout=20),
        lambda: stub.ListAdapters(inference_pb2.ListAdaptersRequest(page_token=CANARY), timeout=20),
        lambda: operator.GetAdapter(adapters_pb2.GetAdapterRequest(name=CANARY), timeout=20),
        lambda: operator.SetAlias(adapters_pb2.SetAliasRequest(name=CANARY, alias=CANARY, etag=CANARY), timeout=20),
        lambda: push("task.json", CANARY.encode()),
        lambda: push("task.json", json.dumps({CANARY: CANARY}).encode()),
        lambda: push("task.json", json.dumps({"task": CANARY, "chat_template": f"{{{{ {CANARY} }}"}).encode()),
        lambda: push(CONFIG, json.dumps({**config, CANARY: CANARY}).encode()),
        lambda: push(CONFIG, json.dumps({**config, "r": CANARY}).encode()),
        lambda: push(CONFIG, json.dumps({**config, "target_modules": f"({CANARY}"}).encode()),
        lambda: push(f"{CANARY}.bin", b"x"),
        lambda: channel.unary_unary("/chorus.v1.Inference/Tokenize")(b"\x0a\xff" + CANARY.encode(), timeout=20),
    ]


def test_what_callers_write_is_never_logged_not_even_at_debug(server: ServerProcess, adapter: Path) -> None:
    failed = 0
    with server.channel() as channel, server.channel(admin=True) as admin:
        # Whatever was logged before this one is read.
        inference_pb2_grpc.InferenceStub(channel).Tokenize(tasks_pb2.TokenizeRequest(text="x"), timeout=20)
        until(lambda: ended(lines(server))[-1]["method"].endswith("/Tokenize"), "its end is logged")
        before = len(lines(server))
        calls = canaries(channel, admin, adapter)
        for call in calls:
            try:
                call()
            except grpc.RpcError:
                failed += 1
        assert 15 <= failed < len(calls), "it is for calls that fail and for calls that do not"
    until(lambda: len(ended(lines(server)[before:])) == len(calls), "every call's end is logged")
    logged = lines(server)[before:]
    assert any("step failed" in line["message"] and "exception" in line for line in logged), "no bug was logged"
    text = "".join(server.log)
    assert CANARY not in text.lower()
    assert all(line.keys() >= KEYS for line in logged)
