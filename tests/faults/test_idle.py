"""Fault 29: 2,000 connections and 2,000 streams that do nothing cost little, nobody else, and nothing once they end."""

import asyncio
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from chorus.client import Client
from support.claims import until
from support.server import ServerProcess
from support.worlds import PROMPT

MANY, CHANNELS = 2000, 20
# What a client says first in HTTP/2: the preface, and settings, none of them.
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
# 15 to 30 MiB were seen for the connections and 50 for the streams.
MORE_MIB = 120


def descriptors(server: ServerProcess) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


def resident_mib(server: ServerProcess) -> float:
    return psutil.Process(server.process.pid).memory_info().rss / 2**20


@contextmanager
def bounded(server: ServerProcess, client: Client) -> Iterator[None]:
    """Memory stays near what it was, and descriptors come back to it."""
    client.generate(PROMPT, max_tokens=2)
    files, mib = descriptors(server), resident_mib(server)
    yield
    assert resident_mib(server) - mib < MORE_MIB
    until(lambda: descriptors(server) <= files + 2, "descriptors are free again")


@pytest.fixture
def many_files() -> Iterator[None]:
    """Room for this process' ends of the connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, MANY + 1000), hard), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_files")
def test_idle_connections_cost_little_and_nobody_else(calm: ServerProcess, client: Client) -> None:
    host, _, port = calm.inference.rpartition(":")
    with bounded(calm, client), ExitStack() as connections:
        before = descriptors(calm)
        for _ in range(MANY):
            connection = connections.enter_context(socket.create_connection((host, int(port)), timeout=10))
            connection.sendall(HELLO)
        until(lambda: descriptors(calm) > before + 500, "the server has taken many of them")
        assert descriptors(calm) <= before + MANY + 2
        assert client.generate(PROMPT, max_tokens=2, timeout=10).finish_reason


def test_idle_streams_that_come_at_once_are_all_answered_and_cost_little(calm: ServerProcess, client: Client) -> None:
    async def watch_all() -> None:
        # A pool of its own makes each channel a connection.
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
        channels = [grpc.aio.insecure_channel(calm.inference, options=options) for _ in range(CHANNELS)]
        stubs = [health_pb2_grpc.HealthStub(channel) for channel in channels]
        calls = [stubs[i % CHANNELS].Watch(health_pb2.HealthCheckRequest()) for i in range(MANY)]
        statuses = [update.status for update in await asyncio.gather(*(call.read() for call in calls))]
        assert statuses == [health_pb2.HealthCheckResponse.SERVING] * MANY
        answer = await asyncio.to_thread(client.generate, PROMPT, max_tokens=2, timeout=10)
        assert answer.finish_reason
        for channel in channels:
            await channel.close()

    with bounded(calm, client):
        asyncio.run(watch_all())
