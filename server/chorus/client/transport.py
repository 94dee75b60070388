"""Channels' options, retries among them, and what becomes of an error on its way back: to a `ChorusError`."""

import json
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from chorus.errors import BY_CODE, ChorusError, FieldViolation

_DETAILS_KEY = "grpc-status-details-bin"
_MAX_RESPONSE_BYTES = 64 << 20
_LOOPBACK = ("127.0.0.1:", "localhost:", "[::1]:")


# Tried again on UNAVAILABLE: all of a tenant's calls, and what operators read. gRPC itself does it, and only before the
# first message of an answer: from then on the call is committed, so no token ever comes twice.
MAX_ATTEMPTS = 4
_RETRIED = [
    {"service": "chorus.v1.Inference"},
    *(
        {"service": "chorus.admin.v1.Adapters", "method": method}
        for method in ("GetAdapter", "ListAdapters", "ListVersions", "GetResidency")
    ),
]
_RETRY_POLICY = {
    "maxAttempts": MAX_ATTEMPTS,
    "initialBackoff": "0.1s",
    "maxBackoff": "2s",
    "backoffMultiplier": 3,
    "retryableStatusCodes": ["UNAVAILABLE"],
}
SERVICE_CONFIG = json.dumps({"methodConfig": [{"name": _RETRIED, "retryPolicy": _RETRY_POLICY}]})


def channel_options(address: str) -> list[tuple[str, Any]]:
    """Gives a channel's options. What is sent has no limit here: the server has one, and says so."""
    options: list[tuple[str, Any]] = [
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", _MAX_RESPONSE_BYTES),
        ("grpc.enable_retries", 1),
        ("grpc.service_config", SERVICE_CONFIG),
    ]
    if address.startswith(_LOOPBACK):
        # gRPC sends even loopback calls to $http_proxy.
        options.append(("grpc.enable_http_proxy", 0))
    return options


def to_chorus_error(error: grpc.RpcError, address: str, timeout: float | None, request_id: str = "") -> ChorusError:
    """Turns a failed call into the class of `chorus.errors` with its code; without details, says what the code means.

    Codes outside `BY_CODE` (CANCELLED, UNKNOWN) become a plain `ChorusError` whose reason is the code. `request_id` is
    the caller's own, to be found in the server's log.
    """
    found = _to_chorus_error(error, address, timeout)
    found.request_id = request_id or None
    return found


def _to_chorus_error(error: Any, address: str, timeout: float | None) -> ChorusError:
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


def _status_of(error: Any) -> status_pb2.Status | None:
    # An asynchronous call's error is not a call, but has the trailers too.
    if not isinstance(error, grpc.Call | grpc.aio.AioRpcError):
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
