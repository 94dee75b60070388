"""Every error that Chorus raises on purpose, and the gRPC code each one becomes.

    ChorusError
    ├── InvalidArgument      a field out of range, malformed or not finite; a corrupt file
    ├── NotFound             no such adapter (another tenant's looks the same)
    ├── FailedPrecondition   well formed, but not servable here: kind, field, base, rank
    ├── Aborted              stale etag
    ├── ResourceExhausted    queue, memory, slow reader; says when to try again
    ├── DeadlineExceeded
    ├── Unauthenticated
    ├── PermissionDenied
    ├── Unavailable          draining, or the engine lost its device
    ├── Unimplemented        in the contract, not built yet
    ├── DataLoss             stored bytes no longer match their digest
    └── InternalError        a bug; the text carries an id that is also in the log, nothing else

Knows codes and reasons; does not know grpc (`services.status` turns these into google.rpc.Status, `client` turns that
back into these).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

DOMAIN = "chorus"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field that the caller has to change: its path in the request, and what is wrong with it."""

    field: str
    description: str


class ChorusError(Exception):
    """An error with a gRPC code name, a stable UPPER_SNAKE reason, and a text that is safe to send to the caller."""

    code: ClassVar[str] = "UNKNOWN"
    default_reason: ClassVar[str] = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        field: str | None = None,
        violations: Sequence[FieldViolation] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.violations = tuple(violations) or ((FieldViolation(field, message),) if field else ())
        self.retry_after_s = retry_after_s
        # The caller's own id of the request that failed, where it had one; set by the client.
        self.request_id: str | None = None


class InvalidArgument(ChorusError):
    code = "INVALID_ARGUMENT"
    default_reason = "INVALID_ARGUMENT"


class NotFound(ChorusError):
    code = "NOT_FOUND"
    default_reason = "NOT_FOUND"


class FailedPrecondition(ChorusError):
    code = "FAILED_PRECONDITION"
    default_reason = "FAILED_PRECONDITION"


class Aborted(ChorusError):
    code = "ABORTED"
    default_reason = "STALE_ETAG"


class ResourceExhausted(ChorusError):
    code = "RESOURCE_EXHAUSTED"
    default_reason = "RESOURCE_EXHAUSTED"


class DeadlineExceeded(ChorusError):
    code = "DEADLINE_EXCEEDED"
    default_reason = "DEADLINE_EXCEEDED"


class Unauthenticated(ChorusError):
    code = "UNAUTHENTICATED"
    default_reason = "UNAUTHENTICATED"


class PermissionDenied(ChorusError):
    code = "PERMISSION_DENIED"
    default_reason = "PERMISSION_DENIED"


class Unavailable(ChorusError):
    code = "UNAVAILABLE"
    default_reason = "UNAVAILABLE"


class Unimplemented(ChorusError):
    code = "UNIMPLEMENTED"
    default_reason = "UNIMPLEMENTED"


class DataLoss(ChorusError):
    code = "DATA_LOSS"
    default_reason = "DIGEST_MISMATCH"


class InternalError(ChorusError):
    code = "INTERNAL"
    default_reason = "INTERNAL"


BY_CODE: dict[str, type[ChorusError]] = {
    cls.code: cls
    for cls in (
        InvalidArgument,
        NotFound,
        FailedPrecondition,
        Aborted,
        ResourceExhausted,
        DeadlineExceeded,
        Unauthenticated,
        PermissionDenied,
        Unavailable,
        Unimplemented,
        DataLoss,
        InternalError,
    )
}
