"""The threads that read and check adapters. They are daemons, which concurrent.futures' own pool has none of: a load
that hangs on a slow disk must not keep the process from ending.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from queue import Empty, SimpleQueue
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class LoaderThreads(Executor):
    """At most `count` daemon threads, started when there is work; takes work from one thread only."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._started = 0
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
        if self._started < self._count:
            self._started += 1
            threading.Thread(target=self._run, name=f"chorus-loader-{self._started}", daemon=True).start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Ends the threads when they are done with what they run; what has not begun is dropped. Never waits."""
        while True:
            try:
                self._tasks.get_nowait()
            except Empty:
                break
        for _ in range(self._started):
            self._tasks.put(None)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
