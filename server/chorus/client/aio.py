"""`AsyncClient`: `Client` for asyncio, method by method; a test compares the two surfaces."""
# ruff: noqa: ASYNC109 - a timeout is the call's deadline, which the server is told

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack

import grpc

from chorus.admin.v1.adapters_pb2_grpc import AdaptersStub
from chorus.client import calls, wire
from chorus.client.answer import Answer
from chorus.client.calls import Listing, Side, Unary
from chorus.client.folder import AdapterFolder
from chorus.client.names import adapter_name
from chorus.client.requests import Prompt, Sampling, build_request
from chorus.client.results import Adapter, AdapterVersion, Completion, Model, PushedVersion, Residency, Scores
from chorus.client.settings import DEFAULT_TIMEOUT_S, PUSH_TIMEOUT_S, Settings, checked_timeout
from chorus.client.stream import AsyncStream
from chorus.client.transport import channel_options
from chorus.client.upload import Upload
from chorus.v1.inference_pb2_grpc import InferenceStub

if TYPE_CHECKING:
    # Not there at run time.
    from chorus.admin.v1.adapters_pb2_grpc import AdaptersAsyncStub
    from chorus.v1.inference_pb2_grpc import InferenceAsyncStub

T = TypeVar("T")


class AsyncClient:
    """`Client` with awaited methods; arguments, results and errors are the same.

    It belongs to the event loop of its first call. A push tells `on_progress` on that loop.
    """

    def __init__(
        self,
        server: str | None,
        *,
        admin: str | None = None,
        timeout: float | None = DEFAULT_TIMEOUT_S,
        tenant: str | None = None,
    ) -> None:
        self._settings = Settings(server, admin, timeout, tenant)
        # Opened by the first call: a channel belongs to the loop that runs then.
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._tokenizer: bool | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()

    # Tenants

    def stream(
        self,
        prompt: Prompt,
        *,
        adapter: str = "",
        timeout: float | None = None,
        priority: int | None = None,
        request_id: str = "",
        **sampling: Unpack[Sampling],
    ) -> AsyncStream:
        request = build_request(prompt, adapter, sampling, priority=priority, request_id=request_id)
        seconds = self._settings.seconds(timeout)
        return AsyncStream(
            self._inference.Generate(request, timeout=seconds, metadata=self._settings.metadata),
            Answer(request),
            to_error=self._settings.errors_of(Side.INFERENCE, seconds, request_id),
            has_tokenizer=self.has_tokenizer,
        )

    async def generate(
        self,
        prompt: Prompt,
        *,
        adapter: str = "",
        timeout: float | None = None,
        priority: int | None = None,
        request_id: str = "",
        **sampling: Unpack[Sampling],
    ) -> Completion:
        async with self.stream(
            prompt, adapter=adapter, timeout=timeout, priority=priority, request_id=request_id, **sampling
        ) as answer:
            async for _ in answer:
                pass
            return answer.result

    async def score(
        self,
        prompt: str | Sequence[int],
        continuations: Sequence[str] | Sequence[Sequence[int]],
        *,
        adapter: str = "",
        timeout: float | None = None,
        request_id: str = "",
    ) -> Scores:
        return await self._ask(calls.score(prompt, continuations, adapter, request_id), timeout, request_id)

    async def tokenize(self, text: str, *, adapter: str = "", timeout: float | None = None) -> tuple[int, ...]:
        return await self._ask(calls.tokenize(text, adapter), timeout)

    async def detokenize(self, token_ids: Sequence[int], *, timeout: float | None = None) -> str:
        return await self._ask(calls.detokenize(token_ids), timeout)

    async def model(self, *, timeout: float | None = None) -> Model:
        return await self._ask(calls.model(), timeout)

    async def has_tokenizer(self) -> bool:
        if self._tokenizer is None:
            self._tokenizer = (await self.model()).has_tokenizer
        return self._tokenizer

    async def adapters(self, tenant: str | None = None, *, timeout: float | None = None) -> tuple[Adapter, ...]:
        return tuple([item async for item in self._list(calls.adapters(tenant), timeout)])

    async def adapter(self, name: str, *, timeout: float | None = None) -> Adapter:
        return await self._ask(calls.adapter(name), timeout)

    # Operators

    async def push(
        self,
        folder: str | Path,
        *,
        tenant: str,
        name: str,
        alias: str | None = "live",
        on_progress: Callable[[int, int], None] | None = None,
        timeout: float | None = PUSH_TIMEOUT_S,
    ) -> PushedVersion:
        seconds = checked_timeout(timeout)
        with AdapterFolder(Path(folder)) as files:
            upload = Upload(adapter_name(tenant, name), alias, files, on_progress)
            call = self._operator.CreateAdapterVersion(
                upload.messages(), timeout=seconds, metadata=self._settings.metadata
            )
            try:
                return wire.pushed(await call)
            except grpc.RpcError as error:
                raise (upload.failure or self._settings.errors_of(Side.ADMIN, seconds)(error)) from None
            except asyncio.CancelledError:
                # So ends a call whose request iterator raised, too.
                if upload.failure is not None:
                    raise upload.failure from None
                raise
            finally:
                call.cancel()

    async def list_adapters(self, tenant: str | None = None, *, timeout: float | None = None) -> tuple[Adapter, ...]:
        return tuple([item async for item in self._list(calls.list_adapters(tenant), timeout)])

    async def get_adapter(self, name: str, *, timeout: float | None = None) -> Adapter:
        return await self._ask(calls.get_adapter(name), timeout)

    async def versions(self, name: str, *, timeout: float | None = None) -> tuple[AdapterVersion, ...]:
        return tuple([item async for item in self._list(calls.versions(name), timeout)])

    async def set_alias(
        self, name: str, alias: str, digest: str, *, etag: str = "", timeout: float | None = None
    ) -> Adapter:
        return await self._ask(calls.set_alias(name, alias, digest, etag), timeout)

    async def delete(self, name: str, *, timeout: float | None = None) -> None:
        await self._ask(calls.delete(name), timeout)

    async def pin(self, name: str, *, timeout: float | None = None) -> AdapterVersion:
        return await self._ask(calls.pin(name), timeout)

    async def unpin(self, name: str, *, timeout: float | None = None) -> AdapterVersion:
        return await self._ask(calls.unpin(name), timeout)

    async def prefetch(self, name: str, *, timeout: float | None = None) -> None:
        await self._ask(calls.prefetch(name), timeout)

    async def residency(self, *, timeout: float | None = None) -> Residency:
        return await self._ask(calls.residency(), timeout)

    @cached_property
    def _inference(self) -> "InferenceAsyncStub":
        return InferenceStub(self._channel(Side.INFERENCE))

    @cached_property
    def _operator(self) -> "AdaptersAsyncStub":
        return AdaptersStub(self._channel(Side.ADMIN))

    def _channel(self, side: Side) -> grpc.aio.Channel:
        address = self._settings.address_of(side)
        if address not in self._channels:
            self._channels[address] = grpc.aio.insecure_channel(address, options=channel_options(address))
        return self._channels[address]

    async def _ask(self, call: Unary[T], timeout: float | None, request_id: str = "") -> T:
        seconds = self._settings.seconds(timeout)
        return call.read(await self._send(call, seconds, request_id))

    async def _list(self, call: Listing[T], timeout: float | None) -> AsyncIterator[T]:
        """Yields the results of a List call; each page has a deadline of its own."""
        seconds = self._settings.seconds(timeout)
        while True:
            page = await self._send(call, seconds)
            for item in call.read(page):
                yield item
            if not page.next_page_token:
                return
            call.request.page_token = page.next_page_token

    async def _send(self, call: Unary[T] | Listing[T], seconds: float | None, request_id: str = "") -> Any:
        stub = self._inference if call.side is Side.INFERENCE else self._operator
        try:
            return await getattr(stub, call.method)(call.request, timeout=seconds, metadata=self._settings.metadata)
        except grpc.RpcError as error:
            raise self._settings.errors_of(call.side, seconds, request_id)(error) from None
