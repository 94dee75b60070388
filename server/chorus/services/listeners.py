"""The three ports: public gRPC, admin gRPC, Prometheus. Binds them so that a taken port is an error, not a share."""

import asyncio
import contextlib
import errno
import socket
import threading
from wsgiref.simple_server import WSGIServer

import grpc
from grpc_channelz.v1 import channelz
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry, start_http_server

from chorus.errors import ChorusError, FailedPrecondition, InvalidArgument
from chorus.services.interceptors import GuardInterceptor

HEALTH_SERVICE: str = health.SERVICE_NAME
REFLECTION_SERVICE: str = reflection.SERVICE_NAME
CHANNELZ_SERVICE = "grpc.channelz.v1.Channelz"


def grpc_server(guard: GuardInterceptor, max_message_mb: int) -> grpc.aio.Server:
    """A server without port and without services. Must be made on the running event loop."""
    limit = max_message_mb * 2**20
    options = (
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", limit),
        ("grpc.max_send_message_length", limit),
        ("grpc.enable_channelz", 1),
        # A peer that vanished without a word is found within 80 seconds; its adapters and pages are let go.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        # Calls that came and no handler has taken yet: from the first number on gRPC cancels some of them at random, by
        # default from 1,000. A burst is ours to answer, by name.
        ("grpc.server.max_pending_requests", 20_000),
        ("grpc.server.max_pending_requests_hard_limit", 40_000),
    )
    return grpc.aio.server(interceptors=(guard,), options=options)


def add_standard_services(
    server: grpc.aio.Server, health_servicer: health.aio.HealthServicer, services: tuple[str, ...], *, admin: bool
) -> None:
    """Health, reflection, and channelz on the admin port."""
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    names = (*services, HEALTH_SERVICE, REFLECTION_SERVICE)
    if admin:
        channelz.add_channelz_servicer(server)
        names = (*names, CHANNELZ_SERVICE)
    reflection.enable_server_reflection(names, server)


def check_port(host: str, port: int, flag: str) -> None:
    """Raises a ChorusError that names host, port and flag when the port can not be bound."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        raise _port_error(host, port, flag, error) from error


def bind(server: grpc.aio.Server, host: str, port: int, flag: str) -> int:
    """Binds a gRPC server; the real port. Raises like `check_port`."""
    check_port(host, port, flag)
    try:
        return server.add_insecure_port(f"{_bracketed(host)}:{port}")
    except RuntimeError as error:
        raise _port_error(host, port, flag, OSError(errno.EADDRINUSE, "taken")) from error


class MetricsEndpoint:
    """Prometheus' /metrics on a daemon thread."""

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        check_port(host, port, "--metrics-port")
        self._server: WSGIServer
        self._host = host
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        except OSError as error:
            raise _port_error(host, port, "--metrics-port", error) from error
        self.port: int = self._server.server_port

    async def close(self) -> None:
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        # `shutdown` waits for the loop's next poll, up to 0.5 s; a connection ends the poll at once.
        stopping = threading.Thread(target=self._server.shutdown)
        stopping.start()
        with contextlib.suppress(OSError), socket.create_connection((self._host, self.port), 1):
            stopping.join()
        stopping.join()
        self._server.server_close()
        self._thread.join()


def _port_error(host: str, port: int, flag: str, error: OSError) -> ChorusError:
    where = f"{_bracketed(host)}:{port}"
    if error.errno == errno.EADDRINUSE:
        return FailedPrecondition(f"{where} is taken; choose another port with {flag}", reason="PORT_TAKEN")
    if error.errno == errno.EACCES:
        return FailedPrecondition(f"{where} may not be bound by this user; choose another port with {flag}")
    return InvalidArgument(f"{where} can not be bound ({error.strerror or error}); see --host and {flag}", field="host")


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
