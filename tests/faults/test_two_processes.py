"""Front end and engine are two processes: neither outlives the other, and callers are told."""

import signal
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest

from chorus.client import Stream
from chorus.errors import Unavailable
from support.server import CHORUS, ServerProcess


def engine_of(server: ServerProcess) -> psutil.Process:
    [engine] = psutil.Process(server.process.pid).children()
    assert "chorus.engine.process" in " ".join(engine.cmdline())
    return engine


def is_gone(process: psutil.Process, within_s: float) -> bool:
    ended = time.monotonic() + within_s
    while time.monotonic() < ended:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def slow_server(state_dir: Path) -> ServerProcess:
    """Steps of at least 10 ms, so that a long answer takes ten seconds."""
    return ServerProcess(state_dir, failpoints="engine.forward=sleep:0.01")


def long_answer(server: ServerProcess) -> Stream:
    return server.client().stream("My parcel", max_tokens=1000, ignore_eos=True)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSEGV])
def test_an_engine_that_dies_ends_the_answers_and_the_server(tmp_path: Path, signum: signal.Signals) -> None:
    with slow_server(tmp_path / "state") as server, long_answer(server) as answer:
        next(iter(answer))
        threading.Timer(0.05, engine_of(server).send_signal, [signum]).start()
        with pytest.raises(Unavailable) as refused:
            list(answer)
        assert refused.value.reason == "ENGINE_DEAD"
        assert server.wait(10) == 70


def test_an_engine_does_not_outlive_a_front_end_that_was_killed(tmp_path: Path) -> None:
    with slow_server(tmp_path / "state") as server, long_answer(server) as answer:
        next(iter(answer))
        engine = engine_of(server)
        server.process.kill()
        server.wait(5)
        assert is_gone(engine, 5)


def test_an_engine_does_not_outlive_a_front_end_that_was_killed_before_it_was_ready(tmp_path: Path) -> None:
    command = [*CHORUS, "serve", "--state-dir", str(tmp_path / "state"), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as starting:
        front_end = psutil.Process(starting.pid)
        while not front_end.children():
            time.sleep(0.01)
        [engine] = front_end.children()
        front_end.kill()
    assert is_gone(engine, 10)
