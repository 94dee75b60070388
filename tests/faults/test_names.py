"""Fault 6: names that want to be paths, on every field of every method that takes one."""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message_factory import GetMessageClass

from chorus.admin.v1 import adapters_pb2
from chorus.v1 import inference_pb2, inference_pb2_grpc
from support.claims import refused
from support.server import ServerProcess
from support.worlds import listing

BAD_IDS = {
    "up": "..",
    "up and away": "../../../etc/passwd",
    "absolute": "/etc/passwd",
    "hidden": ".ssh",
    "slash": "a/b",
    "backslash": "a\\..\\b",
    "escaped": "%2e%2e%2fa",
    "NUL": "a\0",
    "newline": "acme\n",
    "long": "a" * 65,
    "10k": "a" * 10_000,
    "homoglyph": "аcme",  # noqa: RUF001
    "full width": "ａｃｍｅ",  # noqa: RUF001
    "right to left": "ac\u202eme",
    "upper case": "Acme",
    "dash first": "-acme",
    "home": "~",
    "empty": "",
}
DIGEST = "0" * 64
# What a valid field of that name may look like; `{}` is where the bad id goes.
FORMS = {
    "name": ("{}", "tenants/{}/adapters/a", "tenants/a/adapters/{}", "tenants/a/adapters/a/versions/{}"),
    "adapter": ("{}", "tenants/{}/adapters/a", "tenants/a/adapters/{}", "tenants/a/adapters/a@{}"),
    "parent": ("{}", "tenants/{}", "tenants/{}/adapters/a", "tenants/a/adapters/{}"),
    "header.parent": ("{}", "tenants/{}/adapters/a", "tenants/a/adapters/{}"),
    "alias": ("{}",),
    "header.alias": ("{}",),
    "digest": ("{}",),
    "header.files.name": ("{}",),
}
# Fields that mean something when they are empty: the base model, any tenant, no alias.
MAY_BE_EMPTY = {"adapter", "parent", "digest", "header.alias"}
NOT_NAMES = {"request_id", "text", "prompt", "continuations", "page_token", "etag"}


class Place(NamedTuple):
    """One field of one method that takes a name."""

    admin: bool
    method: str
    field: str


def fields_of(message: Descriptor | None, prefix: str = "") -> Iterator[str]:
    """Paths of the text fields that lie on the way to a name; prompts and samplings are no such way."""
    assert message is not None
    for field in message.fields:
        path = prefix + field.name
        if field.type == FieldDescriptor.TYPE_STRING and path.rpartition(".")[2] not in NOT_NAMES:
            yield path
        elif path in ("header", "header.files"):
            yield from fields_of(field.message_type, path + ".")


SERVICES = {
    False: inference_pb2.DESCRIPTOR.services_by_name["Inference"],
    True: adapters_pb2.DESCRIPTOR.services_by_name["Adapters"],
}
# In the contract, answered UNIMPLEMENTED before anything is read.
NOT_BUILT = {"Classify", "TagTokens", "Answer", "Embed", "CreateTenant", "CreateApiKey", "RevokeApiKey", "SetQuota"}
PLACES = [
    Place(admin, method.name, field)
    for admin, service in SERVICES.items()
    for method in service.methods
    if method.name not in NOT_BUILT
    for field in fields_of(method.input_type)
    if not field.startswith("sampling")
]


def valid_request(place: Place) -> Any:
    """A request whose every field but the place's is in order."""
    message: Any = GetMessageClass(SERVICES[place.admin].methods_by_name[place.method].input_type)()
    names = {field.name for field in message.DESCRIPTOR.fields}
    adapter = "tenants/a/adapters/a"
    if place.method == "CreateAdapterVersion":
        message.header.parent = adapter
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            message.header.files.add(name=name, size_bytes=2)
        return message
    if "name" in names:
        version = place.method.endswith("Version")
        message.name = f"{adapter}/versions/{DIGEST}" if version else adapter
    if "alias" in names:
        message.alias, message.digest = "live", DIGEST
    if "text" in names:
        message.text = "hello"
    if place.method == "Generate":
        message.token_ids.ids.append(3)
    if place.method == "Score":
        message.prompt_token_ids.append(3)
        message.continuation_token_ids.add(ids=[3])
    return message


def call(channel: grpc.Channel, place: Place, request: Any) -> None:
    path = f"/{SERVICES[place.admin].full_name}/{place.method}"
    data = request.SerializeToString()
    methods: dict[str, Callable[[], Any]] = {
        "Generate": lambda: list(channel.unary_stream(path)(data, timeout=10)),
        "CreateAdapterVersion": lambda: channel.stream_unary(path)(iter([data]), timeout=10),
    }
    methods.get(place.method, lambda: channel.unary_unary(path)(data, timeout=10))()


def put(request: Any, field: str, value: str) -> None:
    *way, last = field.split(".")
    for name in way:
        request = getattr(request, name)
        request = request[0] if name == "files" else request
    setattr(request, last, value)


def test_the_places_are_all_there() -> None:
    """Guards the search itself: a method that takes a name by another field is not to be overlooked."""
    assert {place.field for place in PLACES} == set(FORMS)
    assert {place.method for place in PLACES if not place.admin} == {
        *("Generate", "Score", "Tokenize", "ListAdapters", "GetAdapter"),
    }
    assert len({place.method for place in PLACES if place.admin}) == 10


@pytest.mark.parametrize("bad", BAD_IDS.values(), ids=BAD_IDS)
def test_bad_id_is_invalid_wherever_a_name_goes_and_touches_no_file(calm: ServerProcess, bad: str) -> None:
    here = calm.state_dir.parent  # where the server runs
    before = listing(here)
    with calm.channel() as public, calm.channel(admin=True) as admin:
        for place in PLACES:
            for form in FORMS[place.field]:
                value = form.format(bad)
                if not value and place.field in MAY_BE_EMPTY:
                    continue
                request = valid_request(place)
                put(request, place.field, value)
                with refused("INVALID_ARGUMENT") as error:
                    call(admin if place.admin else public, place, request)
                assert len(error.message) < 600, place
                assert error.fields, place
                assert not re.search(r"state|/tmp|\.py|Traceback|errno", error.message), error.message
    assert listing(here) == before


@pytest.mark.parametrize("tenant", ["../a", "/etc", "A", "a" * 64, "a b", "-", ""])
def test_bad_tenant_in_the_metadata_is_invalid(calm: ServerProcess, tenant: str) -> None:
    with calm.channel() as channel, refused("INVALID_ARGUMENT") as error:
        stub = inference_pb2_grpc.InferenceStub(channel)
        stub.ListAdapters(inference_pb2.ListAdaptersRequest(), metadata=(("chorus-tenant", tenant),))
    assert error.fields == ("metadata.chorus-tenant",)
