"""The engine as a process of its own: a socket to the front end, a step thread, and nothing of gRPC.

    main thread: socket ──commands──> EngineThread          step thread: Pacer ──Steps──> socket

It ends with the front end: end of file on the socket, for whatever reason. What a terminal or a supervisor signals to
all processes alike is the front end's to answer, and ignored here. If the engine dies, so does the process, with
EXIT_DIED; the front end sees that too.

When the front end does not read, `sendall` makes the engine wait: nothing is lost, and nothing piles up.
"""

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NoReturn

from chorus import garbage, logs
from chorus.config import ServerConfig
from chorus.engine.imports import leave_out_triton
from chorus.errors import ChorusError

# By name: as a process it is __main__.
log = logging.getLogger("chorus.engine.process")

EXIT_DIED = 70
_PIECE = 1 << 16  # bytes
_SWITCH_SECONDS = 0.0005  # that the step thread waits for the interpreter while a loader computes; Python's own is 5 ms


def main() -> None:
    """`python -m chorus.engine.process FD`: FD is the socket's descriptor, inherited."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    sys.setswitchinterval(_SWITCH_SECONDS)
    with socket.socket(fileno=int(sys.argv[1])) as link:
        _serve(link)


def _serve(link: socket.socket) -> None:
    config = _config(link)
    logs.set_up(config.log_format, config.log_level)
    threading.Thread(target=_end_if_left_alone, args=(link,), name="chorus-alone", daemon=True).start()

    from chorus.engine.wire import Frames, Refused, frame, to_engine

    try:
        # The builder is gone with its OpenMP threads, see `adapters.loader_threads`.
        with garbage.of_a_start(), ThreadPoolExecutor(1) as builder:
            engine, ready = builder.submit(_build, config, link).result()
    except ChorusError as error:
        link.sendall(frame(Refused(error.code, error.reason, error.message)))
        return
    logs.adopt_others()
    engine.start()
    link.sendall(frame(ready))
    frames = Frames(to_engine)
    for data in _pieces(link):
        for command in frames.feed(data):
            engine.send(command)
    engine.stop()


def _config(link: socket.socket) -> ServerConfig:
    """The front end's first message; it sends no other before it has heard back."""
    from chorus.engine.wire import Frames, to_engine

    frames = Frames(to_engine)
    for data in _pieces(link):
        for start in frames.feed(data):
            return ServerConfig.model_validate_json(start.config)
    sys.exit(EXIT_DIED)


def _build(config: ServerConfig, link: socket.socket) -> tuple[Any, Any]:
    """The engine's thread, not started, and what there is to say about it. Raises ChorusError."""
    if config.device == "cpu":
        leave_out_triton()

    import dataclasses

    import torch

    from chorus.engine.assembly import engine_of
    from chorus.engine.memory import plan_memory
    from chorus.engine.messages import Early, StepEvents
    from chorus.engine.pacing import Pacer
    from chorus.engine.thread import EngineThread
    from chorus.engine.wire import Ready, Steps, frame
    from chorus.models.base import load_base
    from chorus.models.digest_cache import DigestCache

    log.debug("the engine's packages are imported")
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

    def post(steps: Sequence[StepEvents | Early]) -> None:
        try:
            link.sendall(frame(Steps(steps)))
        except OSError:
            _end(0)

    pacer = Pacer(post)
    facts = dataclasses.replace(base.facts, context_length=memory.context_length)
    engine = EngineThread(
        lambda wake: engine_of(base, memory, config, on_ready=wake),
        pacer.take,
        lambda error: _die(link, error),
        before_computing=pacer.before_computing,
        threads=config.threads,
    )
    return engine, Ready(facts, memory)


def _die(link: socket.socket, error: BaseException) -> NoReturn:
    from chorus.engine.wire import Died, frame

    with suppress(OSError):
        link.sendall(frame(Died(type(error).__name__)))
    _end(EXIT_DIED)


def _end_if_left_alone(link: socket.socket) -> None:
    """Nobody else reads while the base is loaded. Done with the first command."""
    if not link.recv(1, socket.MSG_PEEK):
        _end(0)


def _end(code: int) -> NoReturn:
    """At once, from any thread: the disk is always safe, and other threads may be in the middle of anything."""
    logging.shutdown()
    os._exit(code)


def _pieces(link: socket.socket) -> Iterator[bytes]:
    """What arrives, until the other side is gone."""
    try:
        while data := link.recv(_PIECE):
            yield data
    except ConnectionError:
        return


if __name__ == "__main__":
    main()
