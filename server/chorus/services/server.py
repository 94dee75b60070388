"""`serve`: loads the base, runs the server until it is drained, minds the signals.

Imports what is heavy only inside `serve`, once a signal ends the process properly.
"""

import asyncio
import dataclasses
import logging
import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

from chorus import logs
from chorus.config import ServerConfig

if TYPE_CHECKING:
    from chorus.engine.memory import MemoryPlan
    from chorus.services.assembly import ChorusServer, Endpoints, MakeEngine, ServedBase

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
    served, make_engine, memory = _load(config)
    logs.adopt_others()
    return asyncio.run(_run(config, served, make_engine, lambda endpoints: on_ready(endpoints, memory)))


def _end_at_once(signum: int, frame: FrameType | None) -> None:
    """Ends the process while nobody is served yet: nothing is to be waited for, and the disk is always safe.

    An exception instead could be lost: it would come up in the middle of whatever another package imports or reads.
    """
    log.info("%s before the server was ready: ended, nothing was served", signal.Signals(signum).name)
    logging.shutdown()
    os._exit(EXIT_INTERRUPTED if signum == signal.SIGINT else 0)


def _load(config: ServerConfig) -> tuple["ServedBase", "MakeEngine", "MemoryPlan"]:
    import torch

    from chorus.engine.engine import Engine
    from chorus.engine.memory import plan_memory
    from chorus.engine.thread import EngineThread
    from chorus.models.base import load_base
    from chorus.models.digest_cache import DigestCache
    from chorus.services.assembly import ServedBase

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    base = load_base(
        config.model,
        device=config.device,
        dtype=config.dtype,
        load_format=config.load_format,
        digests=DigestCache(config.state_dir / "base-digests.json"),
    )
    memory = plan_memory(base, config)

    def build(wake: Callable[[], None]) -> Engine:
        return Engine(
            base,
            memory,
            max_rank=config.max_rank,
            max_rows=config.max_rows,
            max_step_tokens=config.max_step_tokens,
            max_queue=config.max_queue,
            on_ready=wake,
        )

    facts = dataclasses.replace(base.facts, context_length=memory.context_length)
    served = ServedBase(facts, base.tokenizer, base.sites, base.weight)
    return served, lambda on_events, on_death: EngineThread(build, on_events, on_death), memory


async def _run(
    config: ServerConfig, served: "ServedBase", make_engine: "MakeEngine", on_ready: Callable[["Endpoints"], None]
) -> int:
    from chorus.services.assembly import ChorusServer

    server = ChorusServer(config, served, make_engine)
    _on_signals(server)
    try:
        endpoints = await server.start()
        if not server.draining:
            on_ready(endpoints)
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
