"""`Client`: one method per call of the two services, each as thin as it can be.

Does not know what is sent (`requests`, `calls`), how answers are read (`stream`, `wire`), which files a push sends
(`folder`), or what an error becomes (`transport`). `aio.AsyncClient` is its twin.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeVar, Unpack

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
from chorus.client.stream import Stream
from chorus.client.transport import channel_options
from chorus.client.upload import Upload
from chorus.v1.inference_pb2_grpc import InferenceStub

T = TypeVar("T")


class Client:
    """Calls a Chorus server. Thread-safe; holds one connection per address, opened by the first call.

    Args:
        server: `HOST:PORT` of chorus.v1.Inference; None for a client that only administers.
        admin: `HOST:PORT` of chorus.admin.v1.Adapters, for the methods under "operators".
        timeout: seconds that one call may take, streaming and retries included; sent as its deadline. None means no
            deadline.
        tenant: who calls where no adapter's name says so; sent as metadata `chorus-tenant`.

    Adapters and versions may be named in full or as `T/A`, `T/A@alias`, `T/A/versions/DIGEST`. Every method raises a
    `ChorusError` for what the server or the transport reports, and ValueError without the address that it needs.
    A server that answers UNAVAILABLE is asked again, up to four times within two seconds or so, until the first message
    has come; operators' changes are sent once.
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
        self._channels = {
            address: grpc.insecure_channel(address, options=channel_options(address))
            for address in (server, admin)
            if address
        }

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
        prompt: Prompt,
        *,
        adapter: str = "",
        timeout: float | None = None,
        priority: int | None = None,
        request_id: str = "",
        **sampling: Unpack[Sampling],
    ) -> Stream:
        """Starts an answer to a text, to token ids or to messages; `adapter` empty means the base model.

        `timeout` replaces the client's for this call; a smaller `priority` runs earlier; `request_id` is found in the
        server's log. Errors of the server come from iterating the stream.
        """
        request = build_request(prompt, adapter, sampling, priority=priority, request_id=request_id)
        seconds = self._settings.seconds(timeout)
        return Stream(
            self._inference.Generate(request, timeout=seconds, metadata=self._settings.metadata),
            Answer(request),
            to_error=self._settings.errors_of(Side.INFERENCE, seconds, request_id),
            has_tokenizer=lambda: self.has_tokenizer,
        )

    def generate(
        self,
        prompt: Prompt,
        *,
        adapter: str = "",
        timeout: float | None = None,
        priority: int | None = None,
        request_id: str = "",
        **sampling: Unpack[Sampling],
    ) -> Completion:
        """Waits for the whole answer, all `n` outputs of it; see `stream`."""
        with self.stream(
            prompt, adapter=adapter, timeout=timeout, priority=priority, request_id=request_id, **sampling
        ) as answer:
            for _ in answer:
                pass
            return answer.result

    def score(
        self,
        prompt: str | Sequence[int],
        continuations: Sequence[str] | Sequence[Sequence[int]],
        *,
        adapter: str = "",
        timeout: float | None = None,
        request_id: str = "",
    ) -> Scores:
        """Tells how likely each continuation of the prompt is; all texts or all token ids."""
        return self._ask(calls.score(prompt, continuations, adapter, request_id), timeout, request_id)

    def tokenize(self, text: str, *, adapter: str = "", timeout: float | None = None) -> tuple[int, ...]:
        """Gives the token ids that the model sees for a text."""
        return self._ask(calls.tokenize(text, adapter), timeout)

    def detokenize(self, token_ids: Sequence[int], *, timeout: float | None = None) -> str:
        """Gives the text of token ids."""
        return self._ask(calls.detokenize(token_ids), timeout)

    def model(self, *, timeout: float | None = None) -> Model:
        """Tells the base model's facts."""
        return self._ask(calls.model(), timeout)

    @cached_property
    def has_tokenizer(self) -> bool:
        """Whether texts go in and out; asked once, and only if needed."""
        return self.model().has_tokenizer

    def adapters(self, tenant: str | None = None, *, timeout: float | None = None) -> tuple[Adapter, ...]:
        """Lists what `tenant` may call, the client's own tenant if None."""
        return tuple(self._list(calls.adapters(tenant), timeout))

    def adapter(self, name: str, *, timeout: float | None = None) -> Adapter:
        """Gets one adapter that this tenant may call."""
        return self._ask(calls.adapter(name), timeout)

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
        `on_progress` is told (bytes sent, bytes in all) from another thread. `timeout` None means no deadline.

        Raises:
            InvalidArgument: a pickle, a symbolic link, or a file missing in the folder; nothing was sent then.
            OSError: the folder can not be read.
        """
        seconds = checked_timeout(timeout)
        with AdapterFolder(Path(folder)) as files:
            upload = Upload(adapter_name(tenant, name), alias, files, on_progress)
            # A future, and not a blocking call, so that Ctrl-C gets through; leaving it cancels the upload.
            call = self._operator.CreateAdapterVersion.future(
                upload.messages(), timeout=seconds, metadata=self._settings.metadata
            )
            try:
                return wire.pushed(call.result())
            except grpc.RpcError as error:
                raise (upload.failure or self._settings.errors_of(Side.ADMIN, seconds)(error)) from None
            finally:
                call.cancel()

    def list_adapters(self, tenant: str | None = None, *, timeout: float | None = None) -> tuple[Adapter, ...]:
        """Lists every adapter of a tenant, of all tenants if None."""
        return tuple(self._list(calls.list_adapters(tenant), timeout))

    def get_adapter(self, name: str, *, timeout: float | None = None) -> Adapter:
        """Gets one adapter, whoever's it is."""
        return self._ask(calls.get_adapter(name), timeout)

    def versions(self, name: str, *, timeout: float | None = None) -> tuple[AdapterVersion, ...]:
        """Lists every version of an adapter."""
        return tuple(self._list(calls.versions(name), timeout))

    def set_alias(self, name: str, alias: str, digest: str, *, etag: str = "", timeout: float | None = None) -> Adapter:
        """Points an alias at a version, by digest or resource name; an empty `digest` removes the alias.

        Raises:
            Aborted: `etag` is given and the adapter has changed since.
        """
        return self._ask(calls.set_alias(name, alias, digest, etag), timeout)

    def delete(self, name: str, *, timeout: float | None = None) -> None:
        """Deletes a version, or an adapter with all its versions, whichever `name` is."""
        self._ask(calls.delete(name), timeout)

    def pin(self, name: str, *, timeout: float | None = None) -> AdapterVersion:
        """Keeps a version on the device; loads it if need be."""
        return self._ask(calls.pin(name), timeout)

    def unpin(self, name: str, *, timeout: float | None = None) -> AdapterVersion:
        """Lets a version be evicted again."""
        return self._ask(calls.unpin(name), timeout)

    def prefetch(self, name: str, *, timeout: float | None = None) -> None:
        """Loads a version before the first call needs it."""
        self._ask(calls.prefetch(name), timeout)

    def residency(self, *, timeout: float | None = None) -> Residency:
        """Tells what is in memory, where, and how much of the budget it takes."""
        return self._ask(calls.residency(), timeout)

    @cached_property
    def _inference(self) -> InferenceStub:
        return InferenceStub(self._channels[self._settings.address_of(Side.INFERENCE)])

    @cached_property
    def _operator(self) -> AdaptersStub:
        return AdaptersStub(self._channels[self._settings.address_of(Side.ADMIN)])

    def _ask(self, call: Unary[T], timeout: float | None, request_id: str = "") -> T:
        seconds = self._settings.seconds(timeout)
        return call.read(self._send(call, seconds, request_id))

    def _list(self, call: Listing[T], timeout: float | None) -> Iterator[T]:
        """Yields the results of a List call; each page has a deadline of its own."""
        seconds = self._settings.seconds(timeout)
        while True:
            page = self._send(call, seconds)
            yield from call.read(page)
            if not page.next_page_token:
                return
            call.request.page_token = page.next_page_token

    def _send(self, call: Unary[T] | Listing[T], seconds: float | None, request_id: str = "") -> Any:
        stub = self._inference if call.side is Side.INFERENCE else self._operator
        try:
            return getattr(stub, call.method)(call.request, timeout=seconds, metadata=self._settings.metadata)
        except grpc.RpcError as error:
            raise self._settings.errors_of(call.side, seconds, request_id)(error) from None
