"""Loader threads do what an executor does, and let the process end."""

import subprocess
import sys
import threading

import pytest

from chorus.adapters.loader_threads import LoaderThreads

HANGS = """
import time
from chorus.adapters.loader_threads import LoaderThreads
threads = LoaderThreads(1)
threads.submit(time.sleep, 60)
threads.shutdown()
"""


def test_results_and_errors_come_back() -> None:
    threads = LoaderThreads(2)
    numbers = [threads.submit(pow, 2, n) for n in range(20)]
    bad = threads.submit(int, "no number")
    assert [future.result(5) for future in numbers] == [2**n for n in range(20)]
    with pytest.raises(ValueError, match="no number"):
        bad.result(5)
    threads.shutdown()


def test_as_many_run_at_once_as_there_are_threads() -> None:
    threads = LoaderThreads(2)
    together = threading.Barrier(2)
    for future in [threads.submit(together.wait, 5) for _ in range(2)]:
        future.result(10)
    threads.shutdown()


def test_cancelled_work_does_not_run_and_shutdown_drops_what_has_not_begun() -> None:
    threads = LoaderThreads(1)
    go = threading.Event()
    ran: list[int] = []
    first = threads.submit(go.wait, 5)
    cancelled, dropped = threads.submit(ran.append, 1), threads.submit(ran.append, 2)
    assert cancelled.cancel()
    threads.shutdown()
    go.set()
    assert first.result(5)
    assert not dropped.done()
    assert ran == []


def test_work_that_hangs_does_not_keep_the_process_from_ending() -> None:
    assert subprocess.run([sys.executable, "-c", HANGS], timeout=20, check=False).returncode == 0
