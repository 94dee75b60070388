"""A real `chorus serve` process on free loopback ports, driven from outside."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from chorus.client import Client
from support.scrape import Scrape

READY = re.compile(r"^chorus ready inference=(\S+) admin=(\S+) metrics=(\S+)$")
# Two that start at once on a fresh machine took 72 beside two busy processes on two cores: they compile.
START_SECONDS = 240.0

# A process that dies of a signal says where.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
CHORUS = [sys.executable, "-c", "from chorus.cli.main import main; main()"]


class ServerProcess:
    """Starts on entry and waits until it is ready; on exit SIGTERM, then SIGKILL. Output is kept in `log`.

    It runs in `state_dir`'s parent folder, and what it listens on is in `inference`, `admin` and `metrics`.

    Raises:
        RuntimeError: the process ended, or was not ready in time; with its output.
    """

    def __init__(
        self, state_dir: Path, *options: str, failpoints: str = "", env: Mapping[str, str] | None = None
    ) -> None:
        ports = ["--port", "0", "--admin-port", "0", "--metrics-port", "0"]
        self._command = [*CHORUS, "serve", "--state-dir", str(state_dir), *ports, *options]
        self._env = {**os.environ, **ENVIRONMENT, "CHORUS_FAILPOINTS": failpoints, **(env or {})}
        self.state_dir = state_dir
        self.log: list[str] = []
        self.inference = self.admin = self.metrics = ""

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            self._command,
            env=self._env,
            cwd=self.state_dir.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._ready.wait(START_SECONDS) or not self.inference:
            self._end(signal.SIGKILL)
            raise RuntimeError("the server did not start:\n" + "".join(self.log))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(signal.SIGTERM)

    def client(self, **options: Any) -> Client:
        """A client of both ports."""
        return Client(self.inference, admin=self.admin, **options)

    @contextmanager
    def channel(self, *, admin: bool = False) -> Iterator[grpc.Channel]:
        """A bare channel to one of the ports, connected."""
        address = self.admin if admin else self.inference
        with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
            grpc.channel_ready_future(channel).result(timeout=10)
            yield channel

    def scrape(self) -> Scrape:
        """What Prometheus would read now."""
        return Scrape.of(self.metrics)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self, timeout: float) -> int:
        """The exit code."""
        return self.process.wait(timeout)

    def wait_for_log(self, text: str, timeout: float = 20.0) -> None:
        """Returns once a line with `text` was printed."""
        ended = time.monotonic() + timeout
        while not any(text in line for line in self.log):
            if time.monotonic() > ended:
                raise RuntimeError(f"{text!r} was not printed:\n" + "".join(self.log))
            time.sleep(0.02)

    def _end(self, signum: int) -> None:
        if self.alive:
            self.process.send_signal(signum)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(5)
        assert self.process.stdout is not None
        self.process.stdout.close()
        code = self.process.returncode
        if code < 0 and -code not in (signal.SIGKILL, signal.SIGTERM):
            raise RuntimeError(f"the server died of {signal.Signals(-code).name}:\n" + "".join(self.log))

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log.append(line)
            if match := READY.match(line.strip()):
                self.inference, self.admin, self.metrics = match.groups()
                self._ready.set()
        self._ready.set()


@contextmanager
def together(*servers: ServerProcess) -> Iterator[tuple[ServerProcess, ...]]:
    """Starts several at once: most of a start is one core importing torch."""
    with ExitStack() as stack, ThreadPoolExecutor(len(servers)) as threads:
        starts = [threads.submit(server.__enter__) for server in servers]
        for server, start in zip(servers, starts, strict=True):
            start.result()
            stack.push(server)
        yield servers


def run_command(*arguments: str, timeout: float = 120.0) -> "subprocess.CompletedProcess[str]":
    """Runs `chorus ARGUMENTS` as a process of its own."""
    return subprocess.run([*CHORUS, *arguments], capture_output=True, text=True, timeout=timeout, check=False)
