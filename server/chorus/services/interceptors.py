"""The net under every handler, unary and streaming, of both directions: whatever happens, the caller gets a status.

Measured on grpcio 1.85: an exception or a parse failure reaches the client as UNKNOWN with the exception's text, and a
CancelledError that no client caused leaves the client hanging. So requests are parsed into a sentinel that we can
refuse, and handlers run inside `Guard`, which turns what they raise into `chorus.errors`.

Each call gets an id, the caller's own where it sent one: in every line that is logged meanwhile, in the one line that
says how the call ended, and in the trailing metadata `chorus-request-id`.
"""

import asyncio
import contextlib
import inspect
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import Message

from chorus import logs
from chorus.errors import ChorusError, InternalError, InvalidArgument
from chorus.services.findings import is_request_id
from chorus.services.identity import Context
from chorus.services.lifecycle import Lifecycle
from chorus.services.status import to_grpc
from chorus.v1 import generate_pb2

log = logging.getLogger(__name__)
access = logging.getLogger("chorus.access")

REQUEST_ID_METADATA = "chorus-request-id"

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

    async def run(self, context: Context, request: Any, handler: Callable[[], Awaitable[Any]]) -> Any:
        """Awaits the handler; a failure of it becomes the call's status, and the end of the call a line in the log."""
        began = time.monotonic()
        with logs.call(self._method, _id_of(request)) as facts:
            ending = _Ending()
            try:
                result = await self._result(context, handler, ending)
                _tell_id(context, facts["request_id"])
            except ChorusError as failure:
                self._on_error(failure.code, failure.reason)
                ending.code, ending.reason = failure.code, failure.reason
                _tell_id(context, facts["request_id"])
                status = to_grpc(failure)
                told = tuple(context.trailing_metadata() or ())
                await _abort(context, status.code, status.details, (*told, *(status.trailing_metadata or ())))
            else:
                ending.code = "OK"
                return result
            finally:
                self._log_end(ending, time.monotonic() - began)

    async def _result(self, context: Context, handler: Callable[[], Awaitable[Any]], ending: "_Ending") -> Any:
        """What the handler gives. Raises ChorusError for all that goes wrong while somebody still listens."""
        try:
            with self._lifecycle.call(self._method):
                return await handler()
        except (grpc.aio.AbortError, grpc.aio.InternalError):
            # A status that somebody has sent already, or a client that went away between two writes.
            raise
        except ChorusError:
            raise
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                remaining = context.time_remaining()
                ending.code = "DEADLINE_EXCEEDED" if remaining is not None and remaining <= 0 else "CANCELLED"
                raise
            raise internal_error(self._method, error) from error
        except Exception as error:
            raise internal_error(self._method, error) from error

    def _log_end(self, ending: "_Ending", seconds: float) -> None:
        """One line a call; the standard services' at debug only: balancers ask for health all the time."""
        fields: dict[str, Any] = {"code": ending.code, "duration_ms": round(seconds * 1e3, 3)}
        if ending.reason:
            fields["reason"] = ending.reason
        level = logging.INFO if self._method.startswith("/chorus.") else logging.DEBUG
        access.log(level, "call ended", extra={"fields": fields})


@dataclass(slots=True)
class _Ending:
    """How a call ended; a call of which nobody says how was left by its client."""

    code: str = "CANCELLED"
    reason: str = ""


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

        return await guard.run(context, request, call)

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
                    _note_usage(response)
                    await context.write(response)

        await guard.run(context, request, call)

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


def _id_of(request: Any) -> str:
    """The caller's id for the request, if it has one that may stand in a log, or a new one."""
    given = getattr(request, "request_id", "")
    return given if given and is_request_id(given) else logs.new_request_id()


async def _abort(context: Context, code: grpc.StatusCode, details: str, trailing: Any) -> None:
    """Ends the call with a status; of one whose caller has gone meanwhile, or did not read up to it, nothing is left.

    gRPC raises what ended the call itself once a handler that has aborted returns.
    """
    with contextlib.suppress(grpc.aio.InternalError):
        await context.abort(code, details, trailing)


def _tell_id(context: Context, request_id: str) -> None:
    context.set_trailing_metadata((*(context.trailing_metadata() or ()), (REQUEST_ID_METADATA, request_id)))


def _note_usage(response: Any) -> None:
    """The last message of a completion says how many tokens it took, and how long."""
    if isinstance(response, generate_pb2.GenerateResponse) and response.HasField("usage"):
        usage, timing = response.usage, response.timing
        logs.note(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            queue_ms=round(timing.queue.ToNanoseconds() / 1e6, 3),
            first_token_ms=round(timing.first_token.ToNanoseconds() / 1e6, 3),
        )
