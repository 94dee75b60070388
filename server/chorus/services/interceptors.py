"""The net under every handler, unary and streaming, of both directions: whatever happens, the caller gets a status.

Measured on grpcio 1.85: an exception or a parse failure reaches the client as UNKNOWN with the exception's text, and a
CancelledError that no client caused leaves the client hanging. So requests are parsed into a sentinel that we can
refuse, and handlers run inside `Guard`, which turns what they raise into `chorus.errors`.
"""

import asyncio
import inspect
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import Message

from chorus.errors import ChorusError, InternalError, InvalidArgument
from chorus.services.identity import Context
from chorus.services.lifecycle import Lifecycle
from chorus.services.status import to_grpc

log = logging.getLogger(__name__)

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class Malformed:
    """Stands for a request whose bytes do not parse."""


def internal_error(method: str, error: BaseException) -> InternalError:
    """Logs a bug with an id, and makes the error that carries this id and nothing else to the caller."""
    incident = secrets.token_hex(8)
    log.error("internal error %s in %s", incident, method, exc_info=error)
    return InternalError(f"internal error; the server's log has it under {incident}")


class Guard:
    """Runs one method's handler; see the module's docstring. `on_error(code, reason)` counts what went wrong."""

    def __init__(self, method: str, lifecycle: Lifecycle, on_error: Callable[[str, str], None]) -> None:
        self._method = method
        self._lifecycle = lifecycle
        self._on_error = on_error

    async def run(self, context: Context, handler: Callable[[], Awaitable[Any]]) -> Any:
        try:
            with self._lifecycle.call(self._method):
                return await handler()
        except (grpc.aio.AbortError, grpc.aio.InternalError):
            # A status that somebody has sent already, or a client that went away between two writes.
            raise
        except ChorusError as error:
            failure = error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            failure = internal_error(self._method, error)
        except Exception as error:
            failure = internal_error(self._method, error)
        self._on_error(failure.code, failure.reason)
        status = to_grpc(failure)
        told = tuple(context.trailing_metadata() or ())
        return await context.abort(status.code, status.details, (*told, *(status.trailing_metadata or ())))


class GuardInterceptor(grpc.aio.ServerInterceptor):
    """Puts a `Guard` around every handler of a server."""

    def __init__(self, lifecycle: Lifecycle, on_error: Callable[[str, str], None]) -> None:
        self._lifecycle = lifecycle
        self._on_error = on_error

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["Handler | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        return _guarded(handler, Guard(handler_call_details.method, self._lifecycle, self._on_error))


def _guarded(handler: Handler, guard: Guard) -> Handler:
    parse, serialize = _forgiving(handler.request_deserializer), handler.response_serializer
    if handler.request_streaming and handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(_streaming(handler.stream_stream, guard), parse, serialize)
    if handler.request_streaming:
        return grpc.stream_unary_rpc_method_handler(_unary(handler.stream_unary, guard), parse, serialize)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(_streaming(handler.unary_stream, guard), parse, serialize)
    return grpc.unary_unary_rpc_method_handler(_unary(handler.unary_unary, guard), parse, serialize)


def _unary(behavior: Any, guard: Guard) -> Callable[..., Any]:
    async def handle(request: Any, context: Context) -> Any:
        async def call() -> Any:
            return await behavior(_checked(request), context)

        return await guard.run(context, call)

    return handle


def _streaming(behavior: Any, guard: Guard) -> Callable[..., Any]:
    """A coroutine that writes, not a generator that yields: a cancelled write must close the handler at once."""

    async def handle(request: Any, context: Context) -> None:
        async def call() -> None:
            if not inspect.isasyncgenfunction(behavior):
                await behavior(_checked(request), context)
                return
            async with aclosing(behavior(_checked(request), context)) as responses:
                async for response in responses:
                    await context.write(response)

        await guard.run(context, call)

    return handle


def _forgiving(parse: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    if parse is None:
        return None

    def parse_or_sentinel(data: bytes) -> Any:
        try:
            return parse(data)
        except Exception:
            return Malformed()

    return parse_or_sentinel


def _checked(request: Any) -> Any:
    """The request itself, or its stream with every message checked. Raises InvalidArgument for a malformed one."""
    if isinstance(request, Malformed):
        raise InvalidArgument("the request is not a well-formed message of this method", reason="MALFORMED_MESSAGE")
    return request if isinstance(request, Message) else _each_checked(request)


async def _each_checked(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _checked(request)
