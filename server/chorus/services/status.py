"""Chorus errors as google.rpc.Status: the one place where an error becomes what a client sees.

Everything here ends up in HTTP/2 trailers, of which clients accept about 8 KiB, so every part is bounded.
"""

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from chorus.errors import DOMAIN, ChorusError

MAX_MESSAGE_BYTES = 512
MAX_VIOLATIONS = 8
MAX_FIELD_BYTES = 96
MAX_DESCRIPTION_BYTES = 256


def clip(text: str, limit: int) -> str:
    """`text` in at most `limit` UTF-8 bytes, cut between characters; unpaired surrogates become question marks."""
    data = text.encode("utf-8", "replace")
    if len(data) <= limit:
        return data.decode()
    return data[: limit - 3].decode("utf-8", "ignore") + "..."


def to_proto(error: ChorusError) -> status_pb2.Status:
    """The error with ErrorInfo and, where it has them, BadRequest and RetryInfo."""
    details = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)]
    if error.violations:
        details.append(
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(
                        field=clip(v.field, MAX_FIELD_BYTES), description=clip(v.description, MAX_DESCRIPTION_BYTES)
                    )
                    for v in error.violations[:MAX_VIOLATIONS]
                ]
            )
        )
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(
        code=grpc.StatusCode[error.code].value[0], message=clip(error.message, MAX_MESSAGE_BYTES)
    )
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def to_grpc(error: ChorusError) -> grpc.Status:
    """The same for `context.abort_with_status`."""
    status: grpc.Status = rpc_status.to_status(to_proto(error))
    return status
