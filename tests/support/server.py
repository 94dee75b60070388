"""A real `chorus serve` process on free loopback ports, driven from outside."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

READY = re.compile(r"^chorus ready inference=(\S+) admin=(\S+) metrics=(\S+)$")
START_SECONDS = 120.0

CHORUS = [sys.executable, "-c", "from chorus.cli.main import main; main()"]


class ServerProcess:
    """Starts on entry and waits until it is ready; on exit SIGTERM, then SIGKILL. Output is kept in `log`.

    Raises:
        RuntimeError: the process ended, or was not ready in time; with its output.
    """

    def __init__(self, state_dir: Path, *options: str, env: Mapping[str, str] | None = None) -> None:
        ports = ["--port", "0", "--admin-port", "0", "--metrics-port", "0"]
        self._command = [*CHORUS, "serve", "--state-dir", str(state_dir), *ports, *options]
        self._env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        self.log: list[str] = []
        self.inference = self.admin = self.metrics = ""

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            self._command, env=self._env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._ready.wait(START_SECONDS) or not self.inference:
            self.process.kill()
            raise RuntimeError("the server did not start:\n" + "".join(self.log))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(5)
        assert self.process.stdout is not None
        self.process.stdout.close()

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

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log.append(line)
            if match := READY.match(line.strip()):
                self.inference, self.admin, self.metrics = match.groups()
                self._ready.set()
        self._ready.set()
