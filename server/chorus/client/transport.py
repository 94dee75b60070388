"""Channels, and what becomes of an error on its way back: google.rpc.Status or a bare code to a `ChorusError`."""

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from chorus.errors import BY_CODE, ChorusError, FieldViolation

_DETAILS_KEY = "grpc-status-details-bin"
_MAX_RESPONSE_BYTES = 64 << 20
_LOOPBACK = ("127.0.0.1:", "localhost:", "[::1]:")


def open_channel(address: str) -> grpc.Channel:
    """Opens a channel to `HOST:PORT`. What is sent has no limit here: the server has one, and says so."""
    options: list[tuple[str, int]] = [
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", _MAX_RESPONSE_BYTES),
    ]
    if address.startswith(_LOOPBACK):
        # gRPC sends even loopback calls to $http_proxy.
        options.append(("grpc.enable_http_proxy", 0))
    return grpc.insecure_channel(address, options=options)


def to_chorus_error(error: grpc.RpcError, address: str, timeout: float | None) -> ChorusError:
    """Turns a failed call into the class of `chorus.errors` with its code; without details, says what the code means.

    Codes outside `BY_CODE` (CANCELLED, UNKNOWN) become a plain `ChorusError` whose reason is the code.
    """
    status = _status_of(error)
    name = error.code().name
    if status is None:
        reason, message = _explain(name, error.details() or "", address, timeout)
        return BY_CODE.get(name, ChorusError)(message, reason=reason)

    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    for detail in status.details:
        for message_type in (info, bad, retry):
            detail.Unpack(message_type)
    return BY_CODE.get(name, ChorusError)(
        status.message,
        reason=info.reason or (None if name in BY_CODE else name),
        violations=[FieldViolation(violation.field, violation.description) for violation in bad.field_violations],
        retry_after_s=retry.retry_delay.ToTimedelta().total_seconds() if retry.HasField("retry_delay") else None,
    )


def _status_of(error: grpc.RpcError) -> status_pb2.Status | None:
    if not isinstance(error, grpc.Call):
        return None
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY:
            try:
                return status_pb2.Status.FromString(value if isinstance(value, bytes) else value.encode())
            except DecodeError:
                return None
    return None


def _explain(code: str, details: str, address: str, timeout: float | None) -> tuple[str | None, str]:
    """Gives reason (None: the class's own) and text for an error that the transport raised itself."""
    if code == "UNAVAILABLE":
        return "UNREACHABLE", f"no answer from {address}: is the server running? ({details})"
    if code == "DEADLINE_EXCEEDED" and timeout is not None:
        return None, f"{address} did not finish within {timeout:g} s"
    if code == "UNIMPLEMENTED":
        return None, f"{address} does not serve this call ({details}); is it the right port?"
    return (None if code in BY_CODE else code), details or f"{address} answered {code}"
