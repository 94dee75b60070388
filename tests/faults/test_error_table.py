"""The error table, row by row and method by method: code, reason, domain, and the details that help the caller.

What needs a server of its own has tests of its own: overload and deadlines, limits, drain, poison, device lost, bugs;
and so has DATA_LOSS (`test_damaged`).
"""

from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.message_factory import GetMessageClass

from chorus.admin.v1 import adapters_pb2, adapters_pb2_grpc
from chorus.client import Client
from chorus.errors import FailedPrecondition
from chorus.v1 import generate_pb2, inference_pb2_grpc, tasks_pb2
from faults.test_limits import METHODS, send
from support.claims import refused
from support.server import ServerProcess
from support.worlds import PROMPT, TinyWorld

NOT_BUILT = {"Classify", "TagTokens", "Answer", "Embed", "CreateTenant", "CreateApiKey", "RevokeApiKey", "SetQuota"}
DIGEST = "0" * 64
GHOST = "tenants/ghost/adapters/ghost"
IDS = generate_pb2.TokenIds(ids=PROMPT)
BUILT = [method for method in METHODS if method.name not in NOT_BUILT]
PAGED = [method for method in BUILT if "page_token" in method.input_type.fields_by_name]
NAMED = [
    method
    for method in BUILT
    if {"name", "adapter"} & {*method.input_type.fields_by_name} or method.name == "ListVersions"
]


def id_of(method: Any) -> str:
    return f"{method.containing_service.name}.{method.name}"


def channel_of(server: ServerProcess, method: Any) -> Any:
    return server.channel(admin=method.containing_service.name == "Adapters")


def naming(method: Any, name: str) -> Any:
    """A request of this method that is right, but that nobody has heard of the name."""
    request: Any = GetMessageClass(method.input_type)()
    fields = method.input_type.fields_by_name
    version = method.name.endswith("Version")
    field = next(field for field in ("name", "adapter", "parent") if field in fields)
    setattr(request, field, f"{name}/versions/{DIGEST}" if version else name)
    match method.name:
        case "Generate":
            request.token_ids.CopyFrom(IDS)
        case "Score":
            request.prompt_token_ids.extend(PROMPT)
            request.continuation_token_ids.add(ids=[3])
        case "Tokenize":
            request.text = "hello"
        case "SetAlias":
            request.alias, request.digest = "live", DIGEST
    return request


def takes_text(method: Any) -> bool:
    field = method.input_type.fields_by_number.get(1)
    return field is not None and (field.type == field.TYPE_STRING or field.message_type is not None)


# Field 1 with bytes that are no UTF-8: wrong where it is a text.
BAD_UTF8 = b"\x0a\x02\xff\xfe"
MALFORMED = [
    pytest.param(method, data, id=f"{id_of(method)}-{name}")
    for method in METHODS
    for name, data in {"garbage": b"\xff\xff", "bad UTF-8": BAD_UTF8, "cut": b"\x0a\x7fa"}.items()
    if data != BAD_UTF8 or takes_text(method)
]


@pytest.mark.parametrize(("method", "data"), MALFORMED)
def test_what_does_not_parse_is_invalid(calm: ServerProcess, method: Any, data: bytes) -> None:
    with channel_of(calm, method) as channel, refused("INVALID_ARGUMENT") as error:
        send(channel, method, data)
    assert error.reason == "MALFORMED_MESSAGE"


@pytest.mark.parametrize("method", NAMED, ids=id_of)
def test_unknown_adapter_is_not_found(calm: ServerProcess, method: Any) -> None:
    with channel_of(calm, method) as channel, refused("NOT_FOUND") as error:
        send(channel, method, naming(method, GHOST).SerializeToString())
    assert error.reason == "ADAPTER_NOT_FOUND"
    assert "ghost" not in error.message, "the same text for every name"


@pytest.mark.parametrize("method", PAGED, ids=id_of)
@pytest.mark.parametrize(("field", "value"), [("page_size", -1), ("page_token", "of nobody")])
def test_page_out_of_order_is_invalid_and_named(
    calm: ServerProcess, client: Client, world: TinyWorld, method: Any, field: str, value: Any
) -> None:
    client.push(world.adapter("paged"), tenant="paged", name="paged")
    parent = "tenants/paged/adapters/paged" if method.name == "ListVersions" else "tenants/paged"
    request = GetMessageClass(method.input_type)(parent=parent, **{field: value})
    with channel_of(calm, method) as channel, refused("INVALID_ARGUMENT") as error:
        send(channel, method, request.SerializeToString())
    assert error.fields == (field,)
    assert field in error.message


@pytest.mark.parametrize("method", [m for m in METHODS if m.name in NOT_BUILT], ids=id_of)
def test_what_is_not_built_says_so(calm: ServerProcess, method: Any) -> None:
    with channel_of(calm, method) as channel, refused("UNIMPLEMENTED") as error:
        send(channel, method, b"")
    assert error.reason == "METHOD_NOT_BUILT"
    assert method.name in error.message


STOP = generate_pb2.SamplingParams(stop=["x"])
TEXTS: dict[str, Callable[[Any], Any]] = {
    "text": lambda stub: list(stub.Generate(generate_pb2.GenerateRequest(text="hello"), timeout=20)),
    "sampling.stop": lambda stub: list(
        stub.Generate(generate_pb2.GenerateRequest(token_ids=IDS, sampling=STOP), timeout=20)
    ),
    "prompt": lambda stub: stub.Score(tasks_pb2.ScoreRequest(prompt="a", continuations=["b"]), timeout=20),
    "token_ids": lambda stub: stub.Detokenize(tasks_pb2.DetokenizeRequest(token_ids=PROMPT), timeout=20),
}


@pytest.mark.parametrize("field", TEXTS)
def test_text_on_a_base_without_tokenizer_fails_its_precondition(calm: ServerProcess, field: str) -> None:
    with calm.channel() as channel, refused("FAILED_PRECONDITION") as error:
        TEXTS[field](inference_pb2_grpc.InferenceStub(channel))
    assert error.reason == "NO_TOKENIZER"
    assert error.fields == (field,)


def test_rank_over_the_limit_fails_its_precondition_and_names_the_limit(client: Client, world: TinyWorld) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        client.push(world.adapter("wide", r=32), tenant="table", name="wide")
    assert "32" in caught.value.message
    assert "16" in caught.value.message


def test_adapter_without_a_live_version_fails_its_precondition(client: Client, world: TinyWorld) -> None:
    client.push(world.adapter("dark"), tenant="table", name="dark", alias=None)
    with pytest.raises(FailedPrecondition) as caught:
        client.generate(PROMPT, adapter="table/dark", max_tokens=1)
    assert "live" in caught.value.message


def test_version_that_an_alias_names_is_not_deleted(calm: ServerProcess, client: Client, world: TinyWorld) -> None:
    pushed = client.push(world.adapter("named"), tenant="table", name="named")
    with calm.channel(admin=True) as channel, refused("FAILED_PRECONDITION") as error:
        adapters_pb2_grpc.AdaptersStub(channel).DeleteVersion(
            adapters_pb2.DeleteVersionRequest(name=pushed.version), timeout=20
        )
    assert "live" in error.message


def test_stale_etag_is_aborted(client: Client, calm: ServerProcess, world: TinyWorld) -> None:
    pushed = client.push(world.adapter("raced"), tenant="table", name="raced")
    request = adapters_pb2.SetAliasRequest(
        name="tenants/table/adapters/raced", alias="canary", digest=pushed.digest, etag="stale"
    )
    with calm.channel(admin=True) as channel, refused("ABORTED") as error:
        adapters_pb2_grpc.AdaptersStub(channel).SetAlias(request, timeout=20)
    assert error.reason == "STALE_ETAG"


def test_every_error_of_the_client_says_its_field_or_a_remedy(calm: ServerProcess) -> None:
    """All that is wrong is told at once, each with its field."""
    sampling = generate_pb2.SamplingParams(temperature=-1, top_p=2, n=0, max_tokens=0)
    request = generate_pb2.GenerateRequest(token_ids=IDS, priority=1000, request_id="a\nb", sampling=sampling)
    with calm.channel() as channel, refused("INVALID_ARGUMENT") as error:
        list(inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=20))
    expected = {"priority", "request_id", *(f"sampling.{name}" for name in ("temperature", "top_p", "n", "max_tokens"))}
    assert set(error.fields) == expected
    assert "(and 5 more)" in error.message
