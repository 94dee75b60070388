"""A `chorus serve` process on free ports, for benchmarks that call it from outside."""

import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

READY = re.compile(r"^chorus ready inference=(\S+) admin=(\S+) metrics=(\S+)$")


class LiveServer(NamedTuple):
    """Where it listens, and where its adapters lie."""

    inference: str
    admin: str
    metrics: str
    state_dir: Path


@contextmanager
def live_server(state_dir: Path, *options: str) -> Iterator[LiveServer]:
    """Runs until the block ends.

    Raises:
        RuntimeError: it ended before it was ready; its stderr says why.
    """
    ports = ["--port", "0", "--admin-port", "0", "--metrics-port", "0", "--log-level", "warning"]
    entry = [sys.executable, "-c", "from chorus.cli.main import main; main()"]
    command = [*entry, "serve", "--state-dir", str(state_dir), *ports, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            ready = next((found for line in server.stdout if (found := READY.match(line))), None)
            if ready is None:
                raise RuntimeError(f"the server did not start: exit code {server.wait()}")
            yield LiveServer(ready[1], ready[2], ready[3], state_dir)
        finally:
            server.terminate()


def step_seconds(address: str) -> tuple[float, float]:
    """Seconds of all steps so far, and how many they were."""
    text = urllib.request.urlopen(f"http://{address}/metrics", timeout=10).read().decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("chorus_step_seconds_"))
    return float(values["chorus_step_seconds_sum"]), float(values["chorus_step_seconds_count"])
