"""Puts the services together, and takes them down in the order that loses nothing.

drain ─> health says NOT_SERVING ─> new calls get UNAVAILABLE ─> calls under way finish, or are ended after the grace
─> ports close ─> the engine stops.          The engine dies ─> the same without grace, and another exit code.
"""

import asyncio
import contextlib
import importlib.metadata
import logging
import platform
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Protocol

import grpc
from grpc_health.v1 import health, health_pb2
from transformers import PreTrainedTokenizerFast

from chorus import failpoints
from chorus.admin.v1 import adapters_pb2, adapters_pb2_grpc
from chorus.config import ServerConfig
from chorus.engine.messages import Command, Early, StepEvents
from chorus.errors import Unavailable
from chorus.metrics import Metrics
from chorus.models.facts import BaseFacts
from chorus.services.admin import AdaptersServicer, pin_again
from chorus.services.catalog import Catalog
from chorus.services.chat import Chat
from chorus.services.front_end import EngineFrontEnd
from chorus.services.inference import InferenceServicer
from chorus.services.interceptors import GuardInterceptor
from chorus.services.lifecycle import Lifecycle, draining
from chorus.services.listeners import MetricsEndpoint, add_standard_services, bind, grpc_server
from chorus.services.text import TextCodec
from chorus.services.uploads import Uploads
from chorus.v1 import inference_pb2, inference_pb2_grpc

log = logging.getLogger(__name__)

EXIT_ENGINE_DIED = 70
INFERENCE: str = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
ADAPTERS: str = adapters_pb2.DESCRIPTOR.services_by_name["Adapters"].full_name
# For what is written already to leave the sockets, seconds; health watchers would use up any longer time.
_FLUSH_S = 0.5
_ENGINE_STOP_S = 10.0


class EngineHandle(Protocol):
    """The engine as the server sees it; `chorus.services.engine_process.EngineProcess` is one."""

    def start(self) -> None: ...
    def send(self, command: Command, /) -> None: ...
    def stop(self) -> None: ...


OnEvents = Callable[[Sequence[StepEvents | Early]], None]
MakeEngine = Callable[[OnEvents, Callable[[BaseException], None]], EngineHandle]
"""What it is given may be called from any thread."""


@dataclass(frozen=True, slots=True)
class ServedBase:
    """What the services need of the base model; `facts.context_length` is what is granted."""

    facts: BaseFacts
    tokenizer: PreTrainedTokenizerFast | None


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where the server listens, real ports, and what it serves."""

    host: str
    port: int
    admin_port: int
    metrics_port: int
    facts: BaseFacts
    state_dir: str


class ChorusServer:
    """One server: `start`, then `until_drained`, then `close`, always; all on one event loop."""

    def __init__(self, config: ServerConfig, served: ServedBase, make_engine: MakeEngine) -> None:
        self._config = config
        self._served = served
        self._make_engine = make_engine
        self._loop = asyncio.get_running_loop()
        self._lifecycle = Lifecycle()
        self.metrics = Metrics()
        self._health = health.aio.HealthServicer()
        self._drain_asked = asyncio.Event()
        self._grace_s = config.drain_grace_s
        self._engine_error: BaseException | None = None
        self._closers: contextlib.AsyncExitStack = contextlib.AsyncExitStack()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def draining(self) -> bool:
        return self._drain_asked.is_set()

    @property
    def calls_under_way(self) -> int:
        return self._lifecycle.calls_under_way

    async def start(self) -> Endpoints:
        """Brings everything up; health says SERVING when it returns. Raises what `serve` raises; then `close`."""
        config, facts = self._config, self._served.facts
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        catalog = await asyncio.to_thread(Catalog, config.state_dir, facts.digest)
        self._closers.callback(catalog.close)
        engine = self._make_engine(self._on_events, self._on_death)
        self._front_end = EngineFrontEnd(
            engine, self._loop, self.metrics, stream_queue_tokens=config.stream_queue_tokens
        )
        catalog.on_removed = self._on_removed
        text = TextCodec(self._served.tokenizer, facts)
        self._closers.callback(text.close)
        engine.start()
        self._closers.push_async_callback(_stop_engine, engine)
        metrics_endpoint = MetricsEndpoint(config.host, config.metrics_port, self.metrics.registry)
        self._closers.push_async_callback(metrics_endpoint.close)
        port = await self._start_public(catalog, text)
        admin_port = await self._start_admin(catalog)
        self.metrics.describe(_build_info(), _model_info(facts))
        self._spawn(pin_again(catalog, self._front_end))
        self._warn()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        return Endpoints(config.host, port, admin_port, metrics_endpoint.port, facts, str(config.state_dir))

    def drain_soon(self, grace_s: float | None = None) -> None:
        """Starts the drain, from a signal handler or an RPC."""
        self._spawn(self.begin_drain(grace_s))

    async def begin_drain(self, grace_s: float | None = None) -> None:
        """Health first, so that balancers look elsewhere before anybody is refused."""
        if grace_s is not None:
            self._grace_s = grace_s
        await self._health.enter_graceful_shutdown()
        self._lifecycle.close(draining())
        self._drain_asked.set()

    async def until_drained(self) -> int:
        """Waits for a drain to be asked for and to be done, or for the engine to die; the exit code."""
        await self._drain_asked.wait()
        if self._engine_error is None and not await self._lifecycle.idle(self._grace_s):
            log.warning("%d calls outlived the grace of %g s", self._lifecycle.calls_under_way, self._grace_s)
            self._lifecycle.end_calls()
        await self._lifecycle.idle(_FLUSH_S)
        return EXIT_ENGINE_DIED if self._engine_error is not None else 0

    async def close(self) -> None:
        """Takes down whatever is up, in reverse order. Idempotent."""
        await self._health.enter_graceful_shutdown()
        self._lifecycle.close(draining())
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._closers.aclose()

    async def _start_public(self, catalog: Catalog, text: TextCodec) -> int:
        server = self._grpc_server()
        chat = Chat(text)
        self._closers.callback(chat.close)
        servicer = InferenceServicer(
            self._front_end,
            catalog,
            text,
            chat,
            self._served.facts,
            max_rank=self._config.max_rank,
            max_outputs=self._config.max_queue,
            end_call=self._lifecycle.end_call,
        )
        inference_pb2_grpc.add_InferenceServicer_to_server(servicer, server)
        add_standard_services(server, self._health, (INFERENCE,), admin=False)
        port = bind(server, self._config.host, self._config.port, "--port")
        await server.start()
        return port

    async def _start_admin(self, catalog: Catalog) -> int:
        server = self._grpc_server()
        uploads = Uploads(catalog.tmp, max_bytes=self._config.max_adapter_mb * 2**20)
        self._closers.callback(uploads.close)
        servicer = AdaptersServicer(
            self._front_end,
            catalog,
            uploads,
            begin_drain=self.begin_drain,
            on_tenant_gone=self.metrics.forget_tenant,
        )
        adapters_pb2_grpc.add_AdaptersServicer_to_server(servicer, server)
        add_standard_services(server, self._health, (ADAPTERS,), admin=True)
        port = bind(server, self._config.host, self._config.admin_port, "--admin-port")
        await server.start()
        return port

    def _grpc_server(self) -> grpc.aio.Server:
        guard = GuardInterceptor(self._lifecycle, self.metrics.error)
        server = grpc_server(guard, self._config.max_message_mb)
        self._closers.push_async_callback(server.stop, _FLUSH_S)
        return server

    def _on_events(self, steps: Sequence[StepEvents | Early]) -> None:
        self._loop.call_soon_threadsafe(self._front_end.deliver, steps)

    def _on_removed(self, digest: str) -> None:
        self._loop.call_soon_threadsafe(self._front_end.unload, digest)

    def _on_death(self, error: BaseException) -> None:
        self._loop.call_soon_threadsafe(lambda: self._spawn(self._engine_died(error)))

    async def _engine_died(self, error: BaseException) -> None:
        log.critical("the engine died; the process ends", exc_info=error)
        self._engine_error = error
        await self._health.enter_graceful_shutdown()
        gone = Unavailable("the server lost its engine; try another one", reason="ENGINE_DEAD", retry_after_s=1.0)
        self._lifecycle.close(gone)
        self._front_end.fail_all(gone)
        self._drain_asked.set()

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in ("", INFERENCE, ADAPTERS):
            await self._health.set(service, status)

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _warn(self) -> None:
        log.warning("no keys are set up: whoever reaches %s may act as any tenant and as operator", self._config.host)
        if points := failpoints.active():
            log.warning("failpoints are armed: %s", ", ".join(points))


async def _stop_engine(engine: EngineHandle) -> None:
    """Waits for the step under way, but not for ever; the threads are daemons and die with the process."""
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()

    def stop() -> None:
        engine.stop()
        loop.call_soon_threadsafe(stopped.set)

    threading.Thread(target=stop, name="chorus-engine-stop", daemon=True).start()
    try:
        async with asyncio.timeout(_ENGINE_STOP_S):
            await stopped.wait()
    except TimeoutError:
        log.error("the engine's step has not ended within %g s; leaving it", _ENGINE_STOP_S)


def _build_info() -> dict[str, str]:
    return {
        "version": importlib.metadata.version("chorus-serve"),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "transformers": importlib.metadata.version("transformers"),
    }


def _model_info(facts: BaseFacts) -> dict[str, str]:
    return {"name": facts.name, "digest": facts.digest, "model_type": facts.model_type, "dtype": facts.dtype}
