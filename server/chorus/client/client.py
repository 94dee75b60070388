"""`Client`: one method per call of the two services, each as thin as it can be.

Does not know how answers are read (`stream`, `wire`), which files a push sends (`folder`), or what an error becomes
(`transport`).
"""

import math
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Self, Unpack

import grpc

from chorus.admin.v1 import adapters_pb2 as admin_pb2
from chorus.admin.v1.adapters_pb2_grpc import AdaptersStub
from chorus.client import wire
from chorus.client.folder import AdapterFolder
from chorus.client.names import adapter_name, digest_of, expand, is_version, tenant_name
from chorus.client.results import Adapter, AdapterVersion, Completion, Model, PushedVersion, Residency
from chorus.client.stream import Sampling, Stream, build_request
from chorus.client.transport import open_channel, to_chorus_error
from chorus.errors import ChorusError, InvalidArgument
from chorus.v1 import inference_pb2
from chorus.v1.inference_pb2_grpc import InferenceStub

PUSH_TIMEOUT_S = 600.0
_ID = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


class Client:
    """Calls a Chorus server. Thread-safe; holds one connection per address.

    Args:
        server: `HOST:PORT` of chorus.v1.Inference; None for a client that only administers.
        admin: `HOST:PORT` of chorus.admin.v1.Adapters, for the methods under "operators".
        timeout: seconds that one call may take, streaming included; sent as its deadline. None means no deadline.
        tenant: who calls where no adapter's name says so; sent as metadata `chorus-tenant`.

    Adapters and versions may be named in full or as `T/A`, `T/A@alias`, `T/A/versions/DIGEST`. Every method raises a
    `ChorusError` for what the server or the transport reports, and ValueError without the address that it needs.
    """

    def __init__(
        self,
        server: str | None,
        *,
        admin: str | None = None,
        timeout: float | None = 60,
        tenant: str | None = None,
    ) -> None:
        if tenant is not None and not _ID.fullmatch(tenant):
            raise InvalidArgument(f"tenant {tenant!r}: must match {_ID.pattern}", field="tenant")
        self._timeout = _checked_timeout(timeout)
        self._metadata = (("chorus-tenant", tenant),) if tenant else ()
        self._server = server
        self._admin = admin
        self._channels = {address: open_channel(address) for address in (server, admin) if address}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections; streams that still run are cancelled."""
        for channel in self._channels.values():
            channel.close()

    # Tenants

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        adapter: str = "",
        timeout: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> Stream:
        """Starts an answer to a text or to token ids; `adapter` empty means the base model.

        `timeout` replaces the client's for this call. Errors of the server come from iterating the stream.
        """
        seconds = self._timeout if timeout is None else _checked_timeout(timeout)
        request = build_request(prompt, adapter, sampling)
        call = self._inference.Generate(request, timeout=seconds, metadata=self._metadata)
        return Stream(
            call,
            to_error=lambda error: to_chorus_error(error, self._server or "", seconds),
            has_tokenizer=lambda: isinstance(prompt, str) or self.has_tokenizer,
        )

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        adapter: str = "",
        timeout: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> Completion:
        """Waits for the whole answer; see `stream`."""
        with self.stream(prompt, adapter=adapter, timeout=timeout, **sampling) as answer:
            for _ in answer:
                pass
            return answer.result

    def model(self) -> Model:
        """Tells the base model's facts."""
        with self._errors_of(self._server):
            return wire.model(self._inference.GetModel(inference_pb2.GetModelRequest(), **self._call_options))

    @cached_property
    def has_tokenizer(self) -> bool:
        """Whether texts go in and out; asked once, and only if needed."""
        return self.model().has_tokenizer

    def adapters(self, tenant: str | None = None) -> tuple[Adapter, ...]:
        """Lists what `tenant` may call, the client's own tenant if None."""
        request = inference_pb2.ListAdaptersRequest(parent=tenant_name(tenant) if tenant else "")
        with self._errors_of(self._server):
            return tuple(
                wire.adapter(adapter)
                for page in _pages(self._inference.ListAdapters, request, self._call_options)
                for adapter in page.adapters
            )

    def adapter(self, name: str) -> Adapter:
        """Gets one adapter that this tenant may call."""
        request = inference_pb2.GetAdapterRequest(name=expand(name))
        with self._errors_of(self._server):
            return wire.adapter(self._inference.GetAdapter(request, **self._call_options))

    # Operators

    def push(
        self,
        folder: str | Path,
        *,
        tenant: str,
        name: str,
        alias: str | None = "live",
        on_progress: Callable[[int, int], None] | None = None,
        timeout: float | None = PUSH_TIMEOUT_S,
    ) -> PushedVersion:
        """Uploads a PEFT folder as a new version of `tenants/TENANT/adapters/NAME`, and moves `alias` to it.

        Sends only `adapter_config.json`, `adapter_model.safetensors` and `task.json`. `alias` None moves nothing.
        `on_progress` is told (bytes sent, bytes in all) from another thread.

        Raises:
            InvalidArgument: a pickle, a symbolic link, or a file missing in the folder; nothing was sent then.
            OSError: the folder can not be read.
        """
        seconds = _checked_timeout(timeout)
        failures: list[Exception] = []
        with AdapterFolder(Path(folder)) as files, self._errors_of(self._admin, seconds, instead=failures):
            header = admin_pb2.UploadHeader(
                parent=adapter_name(tenant, name),
                request_id=uuid.uuid4().hex,
                alias=alias or "",
                files=[admin_pb2.UploadFile(name=file.name, size_bytes=file.size_bytes) for file in files.files],
            )
            parts = _upload(header, files.chunks(on_progress), failures)
            # A future, and not a blocking call, so that Ctrl-C gets through; leaving it cancels the upload.
            call = self._operator.CreateAdapterVersion.future(parts, timeout=seconds, metadata=self._metadata)
            try:
                return wire.pushed(call.result())
            finally:
                call.cancel()

    def list_adapters(self, tenant: str | None = None) -> tuple[Adapter, ...]:
        """Lists every adapter of a tenant, of all tenants if None."""
        request = admin_pb2.ListAdaptersRequest(parent=tenant_name(tenant) if tenant else "")
        with self._errors_of(self._admin):
            return tuple(
                wire.adapter(adapter)
                for page in _pages(self._operator.ListAdapters, request, self._call_options)
                for adapter in page.adapters
            )

    def versions(self, name: str) -> tuple[AdapterVersion, ...]:
        """Lists every version of an adapter."""
        request = admin_pb2.ListVersionsRequest(parent=expand(name))
        with self._errors_of(self._admin):
            return tuple(
                wire.version(version)
                for page in _pages(self._operator.ListVersions, request, self._call_options)
                for version in page.versions
            )

    def set_alias(self, name: str, alias: str, digest: str, *, etag: str = "") -> Adapter:
        """Points an alias at a version, by digest or resource name; an empty `digest` removes the alias.

        Raises:
            Aborted: `etag` is given and the adapter has changed since.
        """
        request = admin_pb2.SetAliasRequest(name=expand(name), alias=alias, digest=digest_of(digest), etag=etag)
        with self._errors_of(self._admin):
            return wire.adapter(self._operator.SetAlias(request, **self._call_options))

    def delete(self, name: str) -> None:
        """Deletes a version, or an adapter with all its versions, whichever `name` is."""
        name = expand(name)
        with self._errors_of(self._admin):
            if is_version(name):
                self._operator.DeleteVersion(admin_pb2.DeleteVersionRequest(name=name), **self._call_options)
            else:
                self._operator.DeleteAdapter(admin_pb2.DeleteAdapterRequest(name=name), **self._call_options)

    def pin(self, name: str) -> AdapterVersion:
        """Keeps a version on the device; loads it if need be."""
        request = admin_pb2.PinVersionRequest(name=expand(name))
        with self._errors_of(self._admin):
            return wire.version(self._operator.PinVersion(request, **self._call_options))

    def unpin(self, name: str) -> AdapterVersion:
        """Lets a version be evicted again."""
        request = admin_pb2.UnpinVersionRequest(name=expand(name))
        with self._errors_of(self._admin):
            return wire.version(self._operator.UnpinVersion(request, **self._call_options))

    def prefetch(self, name: str) -> None:
        """Loads a version before the first call needs it."""
        request = admin_pb2.PrefetchVersionRequest(name=expand(name))
        with self._errors_of(self._admin):
            self._operator.PrefetchVersion(request, **self._call_options)

    def residency(self) -> Residency:
        """Tells what is in memory, where, and how much of the budget it takes."""
        with self._errors_of(self._admin):
            return wire.residency(self._operator.GetResidency(admin_pb2.GetResidencyRequest(), **self._call_options))

    @cached_property
    def _inference(self) -> InferenceStub:
        if not self._server:
            raise ValueError("this client has no server: Client('HOST:PORT')")
        return InferenceStub(self._channels[self._server])

    @cached_property
    def _operator(self) -> AdaptersStub:
        if not self._admin:
            raise ValueError("this client has no admin address: Client(..., admin='HOST:PORT')")
        return AdaptersStub(self._channels[self._admin])

    @property
    def _call_options(self) -> dict[str, Any]:
        return {"timeout": self._timeout, "metadata": self._metadata}

    @contextmanager
    def _errors_of(
        self, address: str | None, timeout: float | None = None, *, instead: Sequence[Exception] = ()
    ) -> Iterator[None]:
        """Translates gRPC errors; the first of `instead`, if any, is what really went wrong."""
        try:
            yield
        except grpc.RpcError as error:
            raise (instead[0] if instead else to_chorus_error(error, address or "", timeout or self._timeout)) from None


def _upload(
    header: admin_pb2.UploadHeader, chunks: Iterator[bytes], failures: list[Exception]
) -> Iterator[admin_pb2.CreateAdapterVersionRequest]:
    """Yields the upload's messages. gRPC swallows what a request iterator raises, so it is put into `failures` too."""
    yield admin_pb2.CreateAdapterVersionRequest(header=header)
    try:
        for data in chunks:
            yield admin_pb2.CreateAdapterVersionRequest(chunk=admin_pb2.UploadChunk(data=data))
    except (OSError, ChorusError) as error:
        failures.append(error)
        raise


def _pages(call: Callable[..., Any], request: Any, options: dict[str, Any]) -> Iterator[Any]:
    """Yields the responses of a List call, page after page."""
    while True:
        page = call(request, **options)
        yield page
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token


def _checked_timeout(timeout: float | None) -> float | None:
    if timeout is not None and not (math.isfinite(timeout) and timeout > 0):
        raise InvalidArgument(f"timeout must be a positive number of seconds, not {timeout}", field="timeout")
    return timeout
