"""One request's tokens on their way from the engine to its reader.

    engine ─Tokens(index)─> [ output 0: t t t ][ output 1: t ] ... ─everything ready, at once─> reader
                            '---- at most `limit` tokens ----'

The queue is bounded in tokens over all outputs: the engine never waits for a reader, and a reader that falls too far
behind loses its own stream only. Knows tokens and errors; not text, protobuf or gRPC. Lives on the event loop.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from chorus.engine.messages import FinishReason, PromptLogprobs, Started, TokenLogprob, Tokens
from chorus.errors import ChorusError
from chorus.metrics import Metrics


@dataclass(frozen=True, slots=True)
class OutputTokens:
    """What was ready of one output, and its end if that is there. `logprobs` is empty or has one entry a token."""

    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None


class Ready(NamedTuple):
    """Everything that was ready since the last read: one entry an output, in the order in which they had something."""

    outputs: tuple[OutputTokens, ...]
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(slots=True)
class _Output:
    """One output on this side. `ended` once the engine or the reader has ended it."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None
    ended: FinishReason | None = None
    last_token_at: float | None = None


@dataclass(frozen=True, slots=True)
class StreamEnds:
    """Whom a stream tells that its reader wants no more: of one output, or of anything."""

    end_output: Callable[["TokenStream", int], None]
    close: Callable[["TokenStream"], None]


class TokenStream:
    """`async for ready in stream`, then `close()`, always.

    `cached_tokens` of its prompt were in the KV cache. Times are on `time.monotonic`'s clock; `started_at` and
    `first_token_at` are None until they happen. `on_unheard` hears of the error that ends the request while nobody
    waits for the next read: whoever reads is busy elsewhere.
    """

    def __init__(
        self,
        request_id: int,
        *,
        n: int,
        tenant: str | None,
        arrived_at: float,
        limit: int,
        metrics: Metrics,
        ends: StreamEnds,
    ) -> None:
        self.request_id = request_id
        self.arrived_at = arrived_at
        self.started_at: float | None = None
        self.first_token_at: float | None = None
        self.adapter_wait = 0.0
        self.cached_tokens = 0
        self.on_unheard: Callable[[ChorusError], None] = lambda error: None
        self._tenant = tenant
        self._limit = limit
        self._metrics = metrics
        self._ends = ends
        self._outputs = [_Output() for _ in range(n)]
        self._running = n
        self._unread: dict[int, None] = {}  # outputs that have something, in the order in which they had
        self._unread_tokens = 0
        self._prompt_logprobs: tuple[TokenLogprob, ...] = ()
        self._ended_at: float | None = None
        self._error: ChorusError | None = None
        self._closed = False
        self._ready = asyncio.Event()
        self._reading = False

    @property
    def over(self) -> bool:
        """Every output has ended, on either side."""
        return not self._running

    def __aiter__(self) -> AsyncIterator[Ready]:
        return self

    async def __anext__(self) -> Ready:
        """Waits until there is something, then takes all of it. Raises the ChorusError that ended the request."""
        if self._closed or (self.over and not self._unread and self._error is None):
            raise StopAsyncIteration
        self._reading = True
        try:
            await self._ready.wait()
        finally:
            self._reading = False
        if self._error is not None:
            raise self._error
        self._ready.clear()
        ready = Ready(tuple(map(self._take, self._unread)), self._prompt_logprobs)
        self._unread.clear()
        self._unread_tokens, self._prompt_logprobs = 0, ()
        return ready

    def end_output(self, index: int, reason: FinishReason) -> None:
        """The reader wants no more of one output; its place in the engine is given back."""
        output = self._outputs[index]
        running = output.ended is None
        self._end(output, reason, time.monotonic())
        if running:
            self._ends.end_output(self, index)

    def close(self) -> None:
        """Lets go of the request, and of its place in the engine if it still runs there. Idempotent."""
        if self._closed:
            return
        self._closed = True
        left = "error" if self._error else FinishReason.ABORTED.value
        reasons = [output.ended.value if output.ended else left for output in self._outputs]
        ended_at = self._ended_at if self._ended_at and (self.over or self._error) else time.monotonic()
        self._metrics.request_finished(reasons, ended_at - self.arrived_at)
        self._ends.close(self)

    def note(self, event: Started | PromptLogprobs) -> None:
        """What is not a token: the first step is about to run; the prompt's part, kept for the next read."""
        if isinstance(event, PromptLogprobs):
            self._prompt_logprobs = event.logprobs
        elif self.started_at is None:
            self.started_at, self.adapter_wait = event.at, event.adapter_wait
            self.cached_tokens = event.cached_tokens
            self._metrics.request_started(event.at - self.arrived_at, event.cached_tokens)

    def push(self, event: Tokens, now: float) -> bool:
        """Queues new tokens; False when the queue would hold more than it may. The last of an output always fits."""
        output = self._outputs[event.index]
        if output.ended:
            return True
        if event.finish is None and self._unread_tokens + len(event.token_ids) > self._limit:
            return False
        if event.token_ids:
            self._count(output, len(event.token_ids), now)
        output.token_ids.extend(event.token_ids)
        output.logprobs.extend(event.logprobs)
        self._unread_tokens += len(event.token_ids)
        if event.finish is not None:
            output.finish = event.finish
            self._end(output, event.finish, now)
        self._unread[event.index] = None
        self._ready.set()
        return True

    def fail(self, error: ChorusError, now: float) -> None:
        """Ends it: what was not read yet is dropped, the reader gets the error."""
        self._unread.clear()
        self._unread_tokens = 0
        for output in self._outputs:
            output.token_ids.clear()
            output.logprobs.clear()
        self._error, self._ended_at = error, now
        self._ready.set()
        if not self._reading and not self._closed:
            self.on_unheard(error)

    def _end(self, output: _Output, reason: FinishReason, now: float) -> None:
        self._running -= output.ended is None
        output.ended, self._ended_at = reason, now

    def _take(self, index: int) -> OutputTokens:
        output = self._outputs[index]
        taken = OutputTokens(index, tuple(output.token_ids), tuple(output.logprobs), output.finish)
        output.token_ids.clear()
        output.logprobs.clear()
        return taken

    def _count(self, output: _Output, tokens: int, now: float) -> None:
        """The first token counts once a request; the time between two tokens belongs to an output."""
        first = None if self.first_token_at else now - self.arrived_at
        since_last = None if output.last_token_at is None else now - output.last_token_at
        self.first_token_at = self.first_token_at or now
        output.last_token_at = now
        self._metrics.tokens_arrived(self._tenant, tokens, first, since_last)
