"""What a client was told, checked once: addresses, default deadline, who calls. Both clients share it."""

import math
import re
from collections.abc import Callable

import grpc

from chorus.client.calls import Side
from chorus.client.transport import to_chorus_error
from chorus.errors import ChorusError, InvalidArgument

DEFAULT_TIMEOUT_S = 60.0
PUSH_TIMEOUT_S = 600.0
# gRPC has names of its own for addresses, `dns:///HOST:PORT` and `unix:PATH` among them; a URL is none.
_SCHEME = re.compile(r"https?://", re.IGNORECASE)
_ADDRESS = re.compile(r":\d+$|^unix:|:///")
_ID = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


class Settings:
    """Raises InvalidArgument for an address that is none, and for a tenant or a timeout that no server would take."""

    def __init__(self, server: str | None, admin: str | None, timeout: float | None, tenant: str | None) -> None:
        if tenant is not None and not _ID.fullmatch(tenant):
            raise InvalidArgument(f"tenant {tenant!r}: must match {_ID.pattern}", field="tenant")
        for name, address in (("server", server), ("admin", admin)):
            if address and (_SCHEME.match(address) or not _ADDRESS.search(address)):
                raise InvalidArgument(f"{name} {address!r}: must be HOST:PORT, as 127.0.0.1:50051", field=name)
        self.timeout = checked_timeout(timeout)
        self.metadata = (("chorus-tenant", tenant),) if tenant else ()
        self._server = server
        self._admin = admin

    def address_of(self, side: Side) -> str:
        """Gives the port's address; ValueError where the client was given none."""
        if side is Side.INFERENCE:
            if not self._server:
                raise ValueError("this client has no server: Client('HOST:PORT')")
            return self._server
        if not self._admin:
            raise ValueError("this client has no admin address: Client(..., admin='HOST:PORT')")
        return self._admin

    def seconds(self, timeout: float | None) -> float | None:
        """Gives a call's deadline: its own, or else the client's."""
        return self.timeout if timeout is None else checked_timeout(timeout)

    def errors_of(
        self, side: Side, seconds: float | None, request_id: str = ""
    ) -> Callable[[grpc.RpcError], ChorusError]:
        """Gives what turns a failed call to this port into a `ChorusError`."""
        address = self.address_of(side)
        return lambda error: to_chorus_error(error, address, seconds, request_id)


def checked_timeout(timeout: float | None) -> float | None:
    """Gives it back; InvalidArgument unless it is None or a positive number of seconds."""
    if timeout is not None and not (math.isfinite(timeout) and timeout > 0):
        raise InvalidArgument(f"timeout must be a positive number of seconds, not {timeout}", field="timeout")
    return timeout
