"""Every call but Generate and the upload, as a value: which method, what is sent, what the answer is read as.

`Client` and `AsyncClient` only differ in how they send these. Does no I/O.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, TypeVar

from chorus.admin.v1 import adapters_pb2 as admin_pb2
from chorus.client import wire
from chorus.client.names import digest_of, expand, is_version, tenant_name
from chorus.client.requests import build_score
from chorus.client.results import Adapter, AdapterVersion, Model, Residency, Scores
from chorus.v1 import inference_pb2, tasks_pb2

T = TypeVar("T")


class Side(Enum):
    """Which of the two services, and so which port."""

    INFERENCE = "chorus.v1.Inference"
    ADMIN = "chorus.admin.v1.Adapters"


@dataclass(frozen=True, slots=True)
class Unary(Generic[T]):
    """One message there, one back, which `read` turns into a result."""

    side: Side
    method: str
    request: Any
    read: Callable[[Any], T]


@dataclass(frozen=True, slots=True)
class Listing(Generic[T]):
    """A List method, page after page; `read` gives a page's results."""

    side: Side
    method: str
    request: Any
    read: Callable[[Any], Iterable[T]]


def model() -> Unary[Model]:
    return Unary(Side.INFERENCE, "GetModel", inference_pb2.GetModelRequest(), wire.model)


def tokenize(text: str, adapter: str) -> Unary[tuple[int, ...]]:
    request = tasks_pb2.TokenizeRequest(text=text, adapter=expand(adapter))
    return Unary(Side.INFERENCE, "Tokenize", request, lambda pb: tuple(pb.token_ids))


def detokenize(token_ids: Sequence[int]) -> Unary[str]:
    return Unary(Side.INFERENCE, "Detokenize", tasks_pb2.DetokenizeRequest(token_ids=token_ids), lambda pb: pb.text)


def score(
    prompt: str | Sequence[int],
    continuations: Sequence[str] | Sequence[Sequence[int]],
    adapter: str,
    request_id: str,
) -> Unary[Scores]:
    return Unary(Side.INFERENCE, "Score", build_score(prompt, continuations, adapter, request_id), wire.scores)


def adapters(tenant: str | None) -> Listing[Adapter]:
    request = inference_pb2.ListAdaptersRequest(parent=tenant_name(tenant) if tenant else "")
    return Listing(Side.INFERENCE, "ListAdapters", request, _adapters)


def adapter(name: str) -> Unary[Adapter]:
    return Unary(Side.INFERENCE, "GetAdapter", inference_pb2.GetAdapterRequest(name=expand(name)), wire.adapter)


def list_adapters(tenant: str | None) -> Listing[Adapter]:
    request = admin_pb2.ListAdaptersRequest(parent=tenant_name(tenant) if tenant else "")
    return Listing(Side.ADMIN, "ListAdapters", request, _adapters)


def get_adapter(name: str) -> Unary[Adapter]:
    return Unary(Side.ADMIN, "GetAdapter", admin_pb2.GetAdapterRequest(name=expand(name)), wire.adapter)


def versions(name: str) -> Listing[AdapterVersion]:
    request = admin_pb2.ListVersionsRequest(parent=expand(name))
    return Listing(Side.ADMIN, "ListVersions", request, lambda page: map(wire.version, page.versions))


def set_alias(name: str, alias: str, digest: str, etag: str) -> Unary[Adapter]:
    request = admin_pb2.SetAliasRequest(name=expand(name), alias=alias, digest=digest_of(digest), etag=etag)
    return Unary(Side.ADMIN, "SetAlias", request, wire.adapter)


def delete(name: str) -> Unary[None]:
    name = expand(name)
    if is_version(name):
        return Unary(Side.ADMIN, "DeleteVersion", admin_pb2.DeleteVersionRequest(name=name), _nothing)
    return Unary(Side.ADMIN, "DeleteAdapter", admin_pb2.DeleteAdapterRequest(name=name), _nothing)


def pin(name: str) -> Unary[AdapterVersion]:
    return Unary(Side.ADMIN, "PinVersion", admin_pb2.PinVersionRequest(name=expand(name)), wire.version)


def unpin(name: str) -> Unary[AdapterVersion]:
    return Unary(Side.ADMIN, "UnpinVersion", admin_pb2.UnpinVersionRequest(name=expand(name)), wire.version)


def prefetch(name: str) -> Unary[None]:
    return Unary(Side.ADMIN, "PrefetchVersion", admin_pb2.PrefetchVersionRequest(name=expand(name)), _nothing)


def residency() -> Unary[Residency]:
    return Unary(Side.ADMIN, "GetResidency", admin_pb2.GetResidencyRequest(), wire.residency)


def _adapters(page: Any) -> Iterable[Adapter]:
    return map(wire.adapter, page.adapters)


def _nothing(_: object) -> None:
    return None
