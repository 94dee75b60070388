"""The front end's end of the engine's process: starts it, speaks with it from the event loop, notices when it is gone.

No call here waits for the engine but `start` and `stop`: what the socket does not take at once is kept until it does.
"""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Self

from chorus import allocator
from chorus.config import ServerConfig
from chorus.engine.messages import Command, Early, StepEvents
from chorus.engine.wire import Died, Frames, Ready, Refused, Start, Steps, frame, from_engine
from chorus.errors import BY_CODE, InternalError

_PIECE = 1 << 16  # bytes; memory for larger ones comes from the system anew each time
_STOP_S = 10.0


class EngineProcess:
    """An engine in a process of its own: construct, `load`, `attach` to an event loop, `start`, and always `stop`.

    It starts loading the base when it is constructed, so that other things can be done meanwhile.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._link, theirs = socket.socketpair()
        with theirs:
            # -P: the folder that it runs in is no place to import from.
            command = [sys.executable, "-P", "-m", "chorus.engine.process", str(theirs.fileno())]
            self._process = subprocess.Popen(
                command,
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                env=allocator.told(os.environ),
            )
        self._frames = Frames(from_engine)
        self._unsent = bytearray()
        self._last_words = ""
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        with suppress(ConnectionError):
            self._link.sendall(frame(Start(config.model_dump_json())))

    def load(self) -> Ready:
        """Waits until the base is loaded.

        Raises:
            ChorusError: it can not be served, or the process ended.
        """
        with suppress(ConnectionError):
            while data := self._link.recv(_PIECE):
                for message in self._frames.feed(data):
                    match message:
                        case Ready():
                            return message
                        case Refused(code, reason, text):
                            raise BY_CODE.get(code, InternalError)(text, reason=reason)
        status = self._process.wait()
        raise InternalError(f"the engine's process ended with code {status} before the base was loaded")

    @property
    def pid(self) -> int:
        return self._process.pid

    def attach(
        self, on_events: Callable[[Sequence[StepEvents | Early]], None], on_death: Callable[[BaseException], None]
    ) -> Self:
        """Both are called on the running event loop, whose own all methods but `stop` are from here on."""
        self._loop = asyncio.get_running_loop()
        self._on_events, self._on_death = on_events, on_death
        return self

    def start(self) -> None:
        assert self._loop is not None
        self._link.setblocking(False)
        self._loop.add_reader(self._link, self._read)

    def send(self, command: Command, /) -> None:
        self._unsent += frame(command)
        self._write()

    def stop(self) -> None:
        """Lets the step under way end, for `_STOP_S` at most, and the process with it. From any thread; idempotent."""
        self._stopping = True
        with suppress(OSError):
            self._link.shutdown(socket.SHUT_WR)
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._loop is None or self._loop.is_closed():
            self._link.close()
        else:
            self._loop.call_soon_threadsafe(self._close)

    def _read(self) -> None:
        try:
            data = self._link.recv(_PIECE)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        if not data:
            self._close()
            if not self._stopping:
                self._on_death(self._how_it_ended())
            return
        for message in self._frames.feed(data):
            match message:
                case Steps(steps):
                    self._on_events(steps)
                case Died(error):
                    self._last_words = error

    def _write(self) -> None:
        assert self._loop is not None
        if self._link.fileno() < 0:
            return
        try:
            sent = self._link.send(self._unsent)
        except BlockingIOError:
            sent = 0
        except ConnectionError:
            sent = len(self._unsent)  # nobody is there; `_read` will see it
        del self._unsent[:sent]
        if self._unsent:
            self._loop.add_writer(self._link, self._write)
        else:
            self._loop.remove_writer(self._link)

    def _close(self) -> None:
        if self._loop is not None and self._link.fileno() >= 0:
            self._loop.remove_reader(self._link)
            self._loop.remove_writer(self._link)
            self._link.close()

    def _how_it_ended(self) -> RuntimeError:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        return RuntimeError(f"its process ended with code {self._process.poll()} {self._last_words}".rstrip())
