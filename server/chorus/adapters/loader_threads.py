"""The threads that read and check adapters. They are daemons, which concurrent.futures' own pool has none of: a load
that hangs on a slow disk must not keep the process from ending.

Their torch runs on one thread each. OpenMP keeps a team for every thread that ever used one; once all teams together
have more threads than there are cores, none of them waits awake any more, and each operator of a step pays for two
wake-ups: 38 ms a step instead of 31 (144M Llama, 16 rows, 2 cores).
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from queue import Empty, SimpleQueue
from typing import ParamSpec, TypeVar

import torch

SHUTDOWN_SECONDS = 0.5

P = ParamSpec("P")
T = TypeVar("T")


class LoaderThreads(Executor):
    """At most `count` daemon threads, started when there is work; takes work from one thread only."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._threads: list[threading.Thread] = []
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Runs `fn` on one of the threads, in the order of submission."""
        future: Future[T] = Future()

        def task() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        self._tasks.put(task)
        if len(self._threads) < self._count:
            thread = threading.Thread(target=self._run, name=f"chorus-loader-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Drops what has not begun and ends the threads; waits half a second at most for what they run.

        So none that is idle is left to be torn down with the interpreter.
        """
        while True:
            try:
                self._tasks.get_nowait()
            except Empty:
                break
        for _ in self._threads:
            self._tasks.put(None)
        ended = time.monotonic() + SHUTDOWN_SECONDS
        for thread in self._threads:
            thread.join(max(ended - time.monotonic(), 0))

    def _run(self) -> None:
        torch.set_num_threads(1)
        while (task := self._tasks.get()) is not None:
            task()
