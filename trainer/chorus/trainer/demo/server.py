"""A `chorus serve` process of the demo's own, and what its metrics say."""

import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from prometheus_client.parser import text_string_to_metric_families

from chorus.errors import Unavailable

START_SECONDS = 120.0
STOP_SECONDS = 30.0
_READY = "chorus ready "
# Straight to the loopback address, whatever proxy the environment names.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True, slots=True)
class Served:
    """Where the server listens, `HOST:PORT` each."""

    inference: str
    admin: str
    metrics: str

    def metric(self, name: str, **labels: str) -> float:
        """One sample of `/metrics`; 0 where the server has not counted any yet."""
        with _OPENER.open(f"http://{self.metrics}/metrics", timeout=10) as response:
            families = text_string_to_metric_families(response.read().decode())
            samples = (sample for family in families for sample in family.samples)
            return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())


@contextmanager
def serving(state_dir: Path) -> Iterator[Served]:
    """Serves the embedded base in fp32 on free loopback ports; drains it and waits for its end on the way out.

    Raises:
        Unavailable: it did not start, or did not end cleanly; with the last lines that it wrote.
    """
    options = ["--dtype", "float32", "--port", "0", "--admin-port", "0", "--metrics-port", "0"]
    chorus = [sys.executable, "-c", "from chorus.cli.main import main; main()"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*chorus, "serve", "--state-dir", str(state_dir), *options], stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            yield _wait_until_ready(process, log)
            process.send_signal(signal.SIGTERM)
            if (code := process.wait(STOP_SECONDS)) != 0:
                raise Unavailable(f"the server ended with code {code}: {_last_lines(log)}")
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def _wait_until_ready(process: "subprocess.Popen[str]", log: IO[str]) -> Served:
    assert process.stdout is not None
    ended = time.monotonic() + START_SECONDS
    for line in process.stdout:
        if line.startswith(_READY):
            fields = dict(field.split("=", 1) for field in line.removeprefix(_READY).split())
            return Served(fields["inference"], fields["admin"], fields["metrics"])
        if time.monotonic() > ended:
            break
    raise Unavailable(f"the server did not start: {_last_lines(log)}")


def _last_lines(log: IO[str]) -> str:
    log.seek(0)
    return " | ".join(log.read().splitlines()[-3:])
