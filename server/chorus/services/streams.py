"""One request's tokens on their way from the engine to its reader.

The queue is bounded in tokens: the engine never waits for a reader, and a reader that falls too far behind loses its
own stream only. Knows tokens and errors; does not know text, protobuf or gRPC. Lives on the event loop.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from chorus.engine.messages import FinishReason, Started, Tokens
from chorus.errors import ChorusError
from chorus.metrics import Metrics


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Everything that was ready since the last read, and the end if it is there."""

    token_ids: tuple[int, ...]
    finish: FinishReason | None = None


class TokenStream:
    """`async for batch in stream`, then `close()`, always.

    Times are on `time.monotonic`'s clock; `started_at` and `first_token_at` are None until they happen.
    """

    def __init__(
        self,
        request_id: int,
        *,
        tenant: str | None,
        arrived_at: float,
        limit: int,
        metrics: Metrics,
        on_close: Callable[["TokenStream"], None],
    ) -> None:
        self.request_id = request_id
        self.arrived_at = arrived_at
        self.started_at: float | None = None
        self.first_token_at: float | None = None
        self.adapter_wait = 0.0
        self._tenant = tenant
        self._limit = limit
        self._metrics = metrics
        self._on_close = on_close
        self._last_token_at: float | None = None
        self._ended_at: float | None = None
        self._pending: list[int] = []
        self._finish: FinishReason | None = None
        self._error: ChorusError | None = None
        self._read_to_end = False
        self._closed = False
        self._ready = asyncio.Event()

    def __aiter__(self) -> AsyncIterator[TokenBatch]:
        return self

    async def __anext__(self) -> TokenBatch:
        """Waits until there is something, then takes all of it. Raises the ChorusError that ended the request."""
        if self._closed or self._read_to_end:
            raise StopAsyncIteration
        await self._ready.wait()
        if self._error is not None:
            raise self._error
        batch = TokenBatch(tuple(self._pending), self._finish)
        self._pending.clear()
        self._ready.clear()
        self._read_to_end = batch.finish is not None
        return batch

    def close(self, reason: FinishReason | None = None) -> None:
        """Lets go of the request, and of its place in the engine if it still runs there. Idempotent.

        `reason` says why the reader stopped; unset, it is what the engine said, or an abort.
        """
        if self._closed:
            return
        self._closed = True
        why = "error" if self._error else (reason or self._finish or FinishReason.ABORTED).value
        self._metrics.request_finished(why, (self._ended_at or time.monotonic()) - self.arrived_at)
        self._on_close(self)

    def start(self, event: Started) -> None:
        """The engine's first step for it is about to run."""
        if self.started_at is None:
            self.started_at, self.adapter_wait = event.at, event.adapter_wait
            self._metrics.request_started(event.at - self.arrived_at)

    def push(self, event: Tokens, now: float) -> bool:
        """Queues new tokens; False when the queue would hold more than it may. The last batch always fits."""
        if event.finish is None and len(self._pending) + len(event.token_ids) > self._limit:
            return False
        if event.token_ids:
            since_last = None if self._last_token_at is None else now - self._last_token_at
            self.first_token_at = self.first_token_at or now
            self._last_token_at = now
            self._metrics.tokens_arrived(self._tenant, len(event.token_ids), now - self.arrived_at, since_last)
        self._pending.extend(event.token_ids)
        if event.finish is not None:
            self._finish, self._ended_at = event.finish, now
        self._ready.set()
        return True

    def fail(self, error: ChorusError, now: float) -> None:
        """Ends it: what was not read yet is dropped, the reader gets the error."""
        self._pending.clear()
        self._error, self._ended_at = error, now
        self._ready.set()
