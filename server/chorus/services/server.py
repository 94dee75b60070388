"""`serve`: starts the engine's process, which loads the base, runs the server until it is drained, minds the signals.

Imports what is heavy only inside `serve`, once a signal ends the process properly.
"""

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

from chorus import garbage, logs
from chorus.config import ServerConfig

if TYPE_CHECKING:
    from chorus.engine.memory import MemoryPlan
    from chorus.engine.wire import Ready
    from chorus.services.assembly import ChorusServer, Endpoints
    from chorus.services.engine_process import EngineProcess

log = logging.getLogger(__name__)

EXIT_INTERRUPTED = 130

__all__ = ["Endpoints", "serve"]


def serve(config: ServerConfig, *, on_ready: Callable[["Endpoints", "MemoryPlan"], None]) -> int:
    """Runs the server until it is drained; returns the exit code. For the main thread.

    Raises:
        ChorusError: it could not start: a taken port, an unreadable model or registry. Nothing is left running.
    """
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, _end_at_once)
    from chorus.services.listeners import check_port

    for port, flag in ((config.port, "--port"), (config.admin_port, "--admin-port")):
        check_port(config.host, port, flag)
    check_port(config.host, config.metrics_port, "--metrics-port")
    log.debug("loading the base model")
    from chorus.services.engine_process import EngineProcess

    engine = EngineProcess(config)
    try:
        with garbage.of_a_start():
            # What is slow to import is imported while the engine loads.
            import chorus.models.checkpoint
            import chorus.models.tokenizer
            import chorus.services.assembly  # noqa: F401

        ready = engine.load()
        log.info("the engine is process %d", engine.pid)
        return asyncio.run(_run(config, engine, ready, on_ready))
    finally:
        engine.stop()


def _end_at_once(signum: int, frame: FrameType | None) -> None:
    """Ends the process while nobody is served yet: nothing is to be waited for, and the disk is always safe.

    An exception instead could be lost: it would come up in the middle of whatever another package imports or reads.
    """
    log.info("%s before the server was ready: ended, nothing was served", signal.Signals(signum).name)
    logging.shutdown()
    os._exit(EXIT_INTERRUPTED if signum == signal.SIGINT else 0)


async def _run(
    config: ServerConfig,
    engine: "EngineProcess",
    ready: "Ready",
    on_ready: Callable[["Endpoints", "MemoryPlan"], None],
) -> int:
    from chorus.models.checkpoint import base_folder
    from chorus.models.tokenizer import load_tokenizer
    from chorus.services.assembly import ChorusServer, ServedBase

    logs.adopt_others()
    with garbage.of_a_start():
        served = ServedBase(ready.facts, load_tokenizer(base_folder(config.model)))
        server = ChorusServer(config, served, engine.attach)
    _on_signals(server)
    try:
        with garbage.of_a_start():
            endpoints = await server.start()
        if not server.draining:
            on_ready(endpoints, ready.memory)
        return await server.until_drained()
    finally:
        await server.close()


def _on_signals(server: "ChorusServer") -> None:
    """SIGTERM and SIGINT drain; an interrupt during the drain ends the process at once (the disk is always safe)."""
    loop = asyncio.get_running_loop()

    def drain(signum: int) -> None:
        if server.draining and signum == signal.SIGINT:
            logging.shutdown()
            os._exit(EXIT_INTERRUPTED)
        log.info("%s: draining", signal.Signals(signum).name)
        server.drain_soon()

    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, drain, signum)
