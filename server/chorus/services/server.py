"""`serve`: loads the base, runs the server until it is drained, minds the signals."""

import asyncio
import dataclasses
import logging
import os
import signal
from collections.abc import Callable

from chorus.config import ServerConfig
from chorus.services.assembly import ChorusServer, Endpoints, MakeEngine, ServedBase
from chorus.services.listeners import check_port

log = logging.getLogger(__name__)

EXIT_INTERRUPTED = 130

__all__ = ["Endpoints", "serve"]


def serve(config: ServerConfig, *, on_ready: Callable[[Endpoints], None]) -> int:
    """Runs the server until it is drained; returns the exit code.

    Raises:
        ChorusError: it could not start: a taken port, an unreadable model or registry. Nothing is left running.
    """
    for port, flag in ((config.port, "--port"), (config.admin_port, "--admin-port")):
        check_port(config.host, port, flag)
    check_port(config.host, config.metrics_port, "--metrics-port")
    # Loaded before there is an event loop, so that an interrupt ends it at once.
    served, make_engine = _load(config)
    return asyncio.run(_run(config, served, make_engine, on_ready))


def _load(config: ServerConfig) -> tuple[ServedBase, MakeEngine]:
    from chorus.engine.engine import Engine
    from chorus.engine.memory import plan_memory
    from chorus.engine.thread import EngineThread
    from chorus.models.base import load_base
    from chorus.models.digest_cache import DigestCache

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
    return ServedBase(facts, base.tokenizer, base.sites, base.weight), lambda on_events, on_death: EngineThread(
        build, on_events, on_death
    )


async def _run(
    config: ServerConfig, served: ServedBase, make_engine: MakeEngine, on_ready: Callable[[Endpoints], None]
) -> int:
    server = ChorusServer(config, served, make_engine)
    try:
        endpoints = await server.start()
        _on_signals(server)
        on_ready(endpoints)
        return await server.until_drained()
    finally:
        await server.close()


def _on_signals(server: ChorusServer) -> None:
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
