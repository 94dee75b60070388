"""Which calls are under way, and whether new ones may start. Knows nothing about gRPC or the engine."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from chorus.errors import ChorusError, Unavailable

# Operators watch and end a drain with these.
_ALWAYS_OPEN = frozenset({"/chorus.admin.v1.Adapters/Drain", "/chorus.admin.v1.Adapters/GetResidency"})


class Lifecycle:
    """Admits calls until `close`; `idle` waits for those under way. Lives on the event loop."""

    def __init__(self) -> None:
        self._closed_by: ChorusError | None = None
        self._calls: set[asyncio.Task[object]] = set()
        self._ended_by: dict[asyncio.Task[object], ChorusError] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def calls_under_way(self) -> int:
        return len(self._calls)

    def close(self, error: ChorusError) -> None:
        """From now on new calls are refused with `error`."""
        self._closed_by = error

    @contextmanager
    def call(self, method: str) -> Iterator[None]:
        """Counts one call of ours; the standard services (health, reflection) are never refused nor waited for."""
        task = asyncio.current_task()
        if task is None or not method.startswith("/chorus."):
            yield
            return
        if self._closed_by is not None and method not in _ALWAYS_OPEN:
            raise fresh(self._closed_by)
        self._calls.add(task)
        self._idle.clear()
        try:
            yield
        except asyncio.CancelledError:
            if error := self._instead_of_cancellation(task):
                raise error from None
            raise
        finally:
            self._calls.discard(task)
            self._ended_by.pop(task, None)
            if not self._calls:
                self._idle.set()

    async def idle(self, timeout_s: float) -> bool:
        """Waits until no call is under way; False if some still are after `timeout_s` seconds."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def end_call(self, task: asyncio.Task[object], error: ChorusError) -> None:
        """Ends one call that is under way, whatever it waits for: it raises `error`. Later errors change nothing."""
        if task in self._calls and task not in self._ended_by:
            self._ended_by[task] = error
            task.cancel()

    def end_calls(self) -> None:
        """Ends what is still under way; each call raises what the server was closed by."""
        if self._closed_by is not None:
            for task in self._calls:
                self.end_call(task, fresh(self._closed_by))

    def _instead_of_cancellation(self, task: asyncio.Task[object]) -> ChorusError | None:
        """The error to give a call that was cancelled here; None if somebody else did."""
        error = self._ended_by.get(task)
        return error if error is not None and task.uncancel() == 0 else None


def draining() -> Unavailable:
    return Unavailable("the server is draining; try another one", reason="DRAINING", retry_after_s=1.0)


def fresh(error: ChorusError) -> ChorusError:
    """The same error as a new object: one object raised for many callers would gather all their tracebacks."""
    return type(error)(
        error.message, reason=error.reason, violations=error.violations, retry_after_s=error.retry_after_s
    )
