"""Fault 30, its beginning: a signal while the base loads ends the process at once and properly."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from support.server import CHORUS, ENVIRONMENT
from support.worlds import TinyWorld

# Packages are still imported at first, then the base is read.
DELAYS_S = (0.0, 0.5, 1.5)
# What the engine may have come to by then.
STARTING = ("Loading weights", "the engine's packages are imported")


@pytest.mark.parametrize("delay_s", DELAYS_S)
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)], ids=["TERM", "INT"])
def test_signal_during_the_start_ends_it_in_one_line(
    world: TinyWorld, tmp_path: Path, signum: signal.Signals, code: int, delay_s: float
) -> None:
    ports = ("--port", "0", "--admin-port", "0", "--metrics-port", "0", "--state-dir", str(tmp_path / "state"))
    with subprocess.Popen(
        [*CHORUS, "serve", "--log-level", "debug", "--model", str(world.base), *ports],
        env={**os.environ, **ENVIRONMENT},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        assert "loading the base model" in process.stderr.readline()
        time.sleep(delay_s)
        process.send_signal(signum)
        out, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert out == ""
    lines = [line for line in err.splitlines() if not any(step in line for step in STARTING)]
    assert len(lines) == 1, err
    assert signum.name in lines[0]
