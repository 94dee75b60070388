"""A gRPC server on a loopback port that answers both services from a script, and remembers what it was asked."""

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from chorus.admin.v1 import adapters_pb2
from chorus.v1 import inference_pb2

SERVICES = (
    inference_pb2.DESCRIPTOR.services_by_name["Inference"],
    adapters_pb2.DESCRIPTOR.services_by_name["Adapters"],
)


@dataclass(frozen=True, slots=True)
class Call:
    """What one call brought: its messages (one, unless streamed), metadata, seconds until its deadline, and the
    caller's end of the connection."""

    method: str
    requests: list[Any]
    metadata: dict[str, str | bytes]
    time_left: float | None
    peer: str

    @property
    def request(self) -> Any:
        [request] = self.requests
        return request


class FakeChorus(grpc.GenericRpcHandler):
    """Script it with `answer`, then look at `calls`. `address` serves the tenants' and the operators' methods alike."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        # Set when a call is over, whoever ended it.
        self.gone = threading.Event()
        self._scripts: dict[str, deque[tuple[object, ...]]] = defaultdict(deque)
        self._methods = {
            f"/{service.full_name}/{method.name}": method for service in SERVICES for method in service.methods
        }
        self._server = grpc.server(ThreadPoolExecutor(8), handlers=[self])
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self.address = f"127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(0).wait()

    def answer(self, method: str, *items: object, times: int = 1) -> None:
        """Queues the answer to one call of `Service.Method`, or to as many as `times` says.

        Items: messages to send; a google.rpc.Status, a (StatusCode, text) pair or (StatusCode, text, details bytes) to
        end with; a callable, called with the request iterator of a streamed upload, or else with the context.
        """
        self._scripts[method].extend([items] * times)

    def until_gone(self, context: grpc.ServicerContext) -> None:
        """An item of a script: waits for the caller of this very call to leave, 10 s at most."""
        gone = threading.Event()
        if context.add_callback(gone.set):
            gone.wait(10)

    def calls_of(self, method: str) -> list[Call]:
        return [call for call in self.calls if call.method == method]

    def service(self, details: Any) -> "grpc.RpcMethodHandler[Any, Any] | None":
        method = self._methods.get(details.method)
        return None if method is None else self._handler(method)

    def _handler(self, method: MethodDescriptor) -> "grpc.RpcMethodHandler[Any, Any]":
        name = f"{method.containing_service.name}.{method.name}"
        many_in = "stream" if method.client_streaming else "unary"
        many_out = "stream" if method.server_streaming else "unary"

        def stream_out(request: Any, context: grpc.ServicerContext) -> Iterator[Message]:
            yield from self._replies(name, request, context, streamed=method.client_streaming)

        def unary_out(request: Any, context: grpc.ServicerContext) -> Message:
            return next(stream_out(request, context))

        make: Callable[..., Any] = getattr(grpc, f"{many_in}_{many_out}_rpc_method_handler")
        handler: grpc.RpcMethodHandler[Any, Any] = make(
            stream_out if method.server_streaming else unary_out,
            request_deserializer=GetMessageClass(method.input_type).FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )
        return handler

    def _replies(self, name: str, request: Any, context: grpc.ServicerContext, *, streamed: bool) -> Iterator[Message]:
        context.add_callback(self.gone.set)
        no_script = ((grpc.StatusCode.UNIMPLEMENTED, "no script"),)
        script = self._scripts[name].popleft() if self._scripts[name] else no_script
        hasty = streamed and not isinstance(script[0], Message)
        received = [] if hasty else list(request) if streamed else [request]
        metadata = dict(context.invocation_metadata() or ())
        self.calls.append(Call(name, received, metadata, context.time_remaining(), context.peer()))
        for item in script:
            match item:
                case Message() if isinstance(item, status_pb2.Status):
                    context.abort_with_status(rpc_status.to_status(item))
                case Message():
                    yield item
                case (grpc.StatusCode() as code, str() as text):
                    context.abort(code, text)
                case (grpc.StatusCode() as code, str() as text, bytes() as details):
                    context.set_trailing_metadata((("grpc-status-details-bin", details),))
                    context.abort(code, text)
                case _ if callable(item):
                    item(request if hasty else context)


def error_status(
    code: grpc.StatusCode,
    message: str,
    reason: str,
    *,
    fields: dict[str, str] | None = None,
    retry_after_s: float | None = None,
) -> status_pb2.Status:
    """A google.rpc.Status as the contract describes it, made from the google messages alone."""
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=reason, domain="chorus")]
    if fields:
        violations = [error_details_pb2.BadRequest.FieldViolation(field=f, description=d) for f, d in fields.items()]
        details.append(error_details_pb2.BadRequest(field_violations=violations))
    if retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status
