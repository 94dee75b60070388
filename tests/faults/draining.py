"""What is seen from outside while a server goes down."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc

from chorus.client import Adapter, Completion
from chorus.errors import ChorusError
from chorus.v1 import inference_pb2, inference_pb2_grpc
from support.claims import Refusal, refused, until
from support.server import ServerProcess
from support.worlds import PROMPT, TinyWorld

SERVICE = "chorus.v1.Inference"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


@dataclass
class Drain:
    """One stream under way and one that waited for its adapter, when SIGTERM came."""

    adapters: tuple[Adapter, ...] = ()
    watched: list[int] = field(default_factory=list)
    refusal: Refusal = field(default_factory=Refusal)
    health_at_refusal: int = 0
    under_way_at_refusal: int = 0
    streaming: Completion | None = None
    loading: Completion | None = None
    exit_code: int | None = None
    log: str = ""


def observe_drain(server: ServerProcess, world: TinyWorld) -> Drain:
    """Sends SIGTERM while `t30/streaming` streams and `t30/loading` loads; returns when the server is gone."""
    seen = Drain()
    with server.client() as client, server.channel() as channel, ThreadPoolExecutor(2) as threads:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("streaming", "loading"):
            client.push(world.adapter(name), tenant="t30", name=name)
        seen.adapters = client.list_adapters()
        stream = client.stream(PROMPT, adapter="t30/streaming", max_tokens=25, **GREEDY)
        next(stream)
        watching = threads.submit(watch, health, seen.watched)
        until(lambda: seen.watched == [SERVING], "health says SERVING")
        late = threads.submit(client.generate, PROMPT, adapter="t30/loading", max_tokens=8, **GREEDY)
        until(lambda: server.scrape().value("chorus_requests_waiting_for_adapter") == 1, "the second one waits")
        server.terminate()
        with refused("UNAVAILABLE") as seen.refusal:
            _call_until_refused(inference_pb2_grpc.InferenceStub(channel))
        seen.health_at_refusal = health.Check(health_pb2.HealthCheckRequest(service=SERVICE)).status
        now = server.scrape()
        seen.under_way_at_refusal = int(now.value("chorus_requests_running") + now.value("chorus_requests_waiting"))
        watching.result(20)
        for _ in stream:
            pass
        seen.streaming, seen.loading = stream.result, late.result(20)
        seen.exit_code = server.wait(20)
        seen.log = "".join(server.log)
    return seen


@dataclass
class Cut:
    """A drain whose grace passes while an adapter still loads."""

    error: ChorusError | None = None
    exit_code: int | None = None
    seconds: float = 0.0


def observe_cut(server: ServerProcess, world: TinyWorld) -> Cut:
    """Sends SIGTERM while a call waits for a load that takes longer than everybody's patience."""
    seen = Cut()
    with server.client() as client, ThreadPoolExecutor(1) as threads:
        client.push(world.adapter("loading"), tenant="t30", name="loading")
        waiting = threads.submit(client.generate, PROMPT, adapter="t30/loading", **GREEDY)
        until(lambda: server.scrape().value("chorus_requests_waiting_for_adapter") == 1, "the call waits")
        began = time.monotonic()
        server.terminate()
        error = waiting.exception(20)
        seen.error = error if isinstance(error, ChorusError) else None
        seen.exit_code = server.wait(40)
        seen.seconds = time.monotonic() - began
    return seen


def watch(health: health_pb2_grpc.HealthStub, statuses: list[int]) -> None:
    """Follows the service's health until it says NOT_SERVING."""
    for update in health.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=30):
        statuses.append(update.status)
        if update.status == NOT_SERVING:
            return


def _call_until_refused(stub: inference_pb2_grpc.InferenceStub) -> None:
    while True:
        stub.GetModel(inference_pb2.GetModelRequest(), timeout=5)
