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
        self._cancelled: set[asyncio.Task[object]] = set()
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
            self._cancelled.discard(task)
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

    def end_calls(self) -> None:
        """Ends what is still under way; each call raises what the server was closed by."""
        for task in self._calls - self._cancelled:
            self._cancelled.add(task)
            task.cancel()

    def _instead_of_cancellation(self, task: asyncio.Task[object]) -> ChorusError | None:
        """The error to give a call that `end_calls` cancelled; None if somebody else did."""
        if self._closed_by is None or task not in self._cancelled:
            return None
        return fresh(self._closed_by) if task.uncancel() == 0 else None


def draining() -> Unavailable:
    return Unavailable("the server is draining; try another one", reason="DRAINING", retry_after_s=1.0)


def fresh(error: ChorusError) -> ChorusError:
    """The same error as a new object: one object raised for many callers would gather all their tracebacks."""
    return type(error)(
        error.message, reason=error.reason, violations=error.violations, retry_after_s=error.retry_after_s
    )
