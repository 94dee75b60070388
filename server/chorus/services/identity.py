"""Who calls. The one place that knows; keys and scopes will change this file and no other.

Until keys exist the server is open: anybody may act as any tenant, and who they are is what they say in the metadata
`chorus-tenant`, or, where that is missing, the tenant in the name of the adapter that they call.
"""

import re
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc

from chorus.errors import FieldViolation, InvalidArgument

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

METADATA_KEY = "chorus-tenant"
_TENANT_ID = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Tenant:
    """The caller. `id` is None for an anonymous caller of an open server."""

    id: str | None

    def acting_on(self, owner: str | None) -> "Tenant":
        """The tenant that a call on `owner`'s adapter is accounted to; an open server believes the name."""
        return Tenant(owner) if owner is not None else self


def tenant_of(context: Context) -> Tenant:
    """The caller of this RPC. Raises InvalidArgument for a malformed `chorus-tenant`."""
    for key, value in context.invocation_metadata() or ():
        if key == METADATA_KEY:
            if not isinstance(value, str) or not _TENANT_ID.fullmatch(value):
                text = "must be 1 to 63 of a-z, 0-9 and '-', and neither start nor end with '-'"
                raise InvalidArgument(
                    f"metadata {METADATA_KEY} {text}", violations=[FieldViolation(f"metadata.{METADATA_KEY}", text)]
                )
            return Tenant(value)
    return Tenant(None)
