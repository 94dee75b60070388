"""Runs a stranger's small program on a thread, and ends it when its time is up.

A thread can not be killed, but an exception can be raised in it (`PyThreadState_SetAsyncExc`); it comes up at the next
call or loop turn in Python code. So whatever loops in Python ends in time. What is inside one call into C (a huge
string operation) is only ended after it; memory is not limited at all.
"""

import asyncio
import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class OutOfTime(BaseException):
    """Raised inside the program; no `except Exception` there may swallow it."""


class TimeLimit:
    """A few threads for programs that may take `seconds` each. Use `run` on the event loop; then `close`."""

    def __init__(self, seconds: float, *, threads: int, name: str) -> None:
        self.seconds = seconds
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=name)

    async def run(self, program: Callable[[], T]) -> T:
        """The program's result. Raises what it raises, TimeoutError when its time is up; the wait does not count."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._limited, program, loop)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _limited(self, program: Callable[[], T], loop: asyncio.AbstractEventLoop) -> T:
        over = _Interrupt(threading.get_ident())
        try:
            try:
                # The loop keeps the time, whoever waits for the program may be gone. A timer that is late does nothing.
                loop.call_soon_threadsafe(loop.call_later, self.seconds, over.strike)
                return program()
            finally:
                over.disarm()
        except OutOfTime:
            raise TimeoutError(f"over {self.seconds:g} s") from None


class _Interrupt:
    """Raises `OutOfTime` in a thread, at most once and never after `disarm`, which that thread calls itself."""

    def __init__(self, thread_id: int) -> None:
        self._thread_id = thread_id
        self._lock = threading.Lock()
        self._armed = True

    def strike(self) -> None:
        with self._lock:
            if self._armed:
                self._raise(OutOfTime)

    def disarm(self) -> None:
        """What was raised and has not come up yet is taken back."""
        with self._lock:
            self._armed = False
            self._raise(None)

    def _raise(self, kind: type[BaseException] | None) -> None:
        exception = None if kind is None else ctypes.py_object(kind)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread_id), exception)
