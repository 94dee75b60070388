"""The front end of the engine: one event loop on this side, one step thread on the other.

    handler ---submit---> EngineFrontEnd ---port.send---> step thread
    handler <-TokenStream- EngineFrontEnd.deliver <--call_soon_threadsafe, once a step-- step thread

Whoever asked gets an answer: tokens, an error of its own, or the error that the engine died of.
"""

import asyncio
import itertools
import time
from collections import defaultdict
from collections.abc import Iterable
from typing import Protocol, TypeVar

from chorus.engine.messages import (
    Abort,
    AdapterRef,
    Command,
    Event,
    Failed,
    Load,
    Loaded,
    LoadFailed,
    Pin,
    PromptLogprobs,
    QueryResidency,
    ResidencyReport,
    Sampling,
    Started,
    StepEvents,
    Submit,
    Tokens,
    Unload,
    Unpin,
)
from chorus.errors import BY_CODE, Aborted, ChorusError, InternalError, ResourceExhausted
from chorus.metrics import Metrics
from chorus.services.lifecycle import fresh
from chorus.services.pacing import pace
from chorus.services.streams import StreamEnds, TokenStream

T = TypeVar("T")


class EnginePort(Protocol):
    """What the front end needs of the engine. `send` may be called from any thread and never blocks."""

    def send(self, command: Command, /) -> None: ...


class EngineFrontEnd:
    """Sends commands, spreads answers. Every method but `post` belongs to the event loop."""

    def __init__(
        self, port: EnginePort, loop: asyncio.AbstractEventLoop, metrics: Metrics, *, stream_queue_tokens: int
    ) -> None:
        self._port = port
        self._loop = loop
        self._metrics = metrics
        self._queue_tokens = stream_queue_tokens
        self._ids = itertools.count(1)
        self._streams: dict[int, TokenStream] = {}
        self._ends = StreamEnds(self._end_output, self._release)
        self._loads: defaultdict[str, list[asyncio.Future[Loaded]]] = defaultdict(list)
        self._reports: dict[int, asyncio.Future[ResidencyReport]] = {}
        self._dead_of: ChorusError | None = None
        # The step thread's own.
        self._held: list[StepEvents] = []
        self._posted_at = 0.0

    def post(self, events: StepEvents) -> None:
        """The engine's `on_events`: called on the step thread, once a step. Holds what can wait; see `pacing`."""
        self._held.append(events)
        if events.at - self._posted_at < pace(len(self._streams)) and not self._is_urgent(events):
            return
        held, self._held = self._held, []
        self._posted_at = events.at
        self._loop.call_soon_threadsafe(self._deliver_all, held)

    @property
    def streams_open(self) -> int:
        return len(self._streams)

    def submit(
        self,
        prompt: tuple[int, ...],
        sampling: Sampling,
        *,
        n: int = 1,
        adapter: AdapterRef | None = None,
        tenant: str | None = None,
        priority: int = 0,
        deadline: float | None = None,
        arrived_at: float | None = None,
    ) -> TokenStream:
        """Hands a request to the engine; the caller must `close` the stream. Raises what the engine died of."""
        stream = TokenStream(
            next(self._ids),
            n=n,
            tenant=tenant,
            arrived_at=time.monotonic() if arrived_at is None else arrived_at,
            limit=self._queue_tokens,
            metrics=self._metrics,
            ends=self._ends,
        )
        self._send(Submit(stream.request_id, prompt, sampling, adapter, priority, deadline, n))
        self._metrics.request_arrived(tenant, len(prompt))
        self._streams[stream.request_id] = stream
        return stream

    async def load(self, adapter: AdapterRef) -> Loaded:
        """Brings a version to the device. Raises what the engine answers."""
        return await self._await_loaded(adapter.digest, Load(adapter))

    async def pin(self, adapter: AdapterRef) -> Loaded:
        """Brings a version to the device and keeps it there. Raises what the engine answers."""
        return await self._await_loaded(adapter.digest, Pin(adapter))

    def unpin(self, digest: str) -> None:
        if self._dead_of is None:
            self._port.send(Unpin(digest))

    def unload(self, digest: str) -> None:
        """Forgets a version once no request holds it; who waits for it to load is told."""
        if self._dead_of is None:
            self._port.send(Unload(digest))
        for future in _open(self._loads.pop(digest, ())):
            future.set_exception(Aborted("the version was deleted while it was loading", reason="VERSION_DELETED"))

    async def residency(self) -> ResidencyReport:
        """What is in memory, as of the engine's next turn."""
        query_id = next(self._ids)
        future: asyncio.Future[ResidencyReport] = self._loop.create_future()
        self._reports[query_id] = future
        try:
            self._send(QueryResidency(query_id))
            return await future
        finally:
            self._reports.pop(query_id, None)

    def deliver(self, step: StepEvents) -> None:
        """Spreads one step's events."""
        for event in step.events:
            self._dispatch(event, step.at)
        self._metrics.step(step)

    def fail_streams(self, error: ChorusError) -> None:
        """Ends every stream with `error`."""
        now = time.monotonic()
        for stream in list(self._streams.values()):
            self._fail(stream, fresh(error), now)

    def fail_all(self, error: ChorusError) -> None:
        """The engine is gone: ends every stream and every wait with `error`, and refuses what comes later."""
        self._dead_of = error
        self.fail_streams(error)
        waiting: list[asyncio.Future[Loaded] | asyncio.Future[ResidencyReport]] = [*self._reports.values()]
        for futures in self._loads.values():
            waiting.extend(futures)
        for future in waiting:
            if not future.done():
                future.set_exception(fresh(error))

    def _dispatch(self, event: Event, now: float) -> None:
        match event:
            case Tokens():
                self._on_tokens(event, now)
            case Started() | PromptLogprobs():
                if stream := self._streams.get(event.request_id):
                    stream.note(event)
            case Failed():
                if stream := self._streams.pop(event.request_id, None):
                    stream.fail(_error(event), now)
            case Loaded():
                self._metrics.adapter_loaded(event.seconds_by_stage)
                for future in _open(self._loads.pop(event.digest, ())):
                    future.set_result(event)
            case LoadFailed():
                for future in _open(self._loads.pop(event.digest, ())):
                    future.set_exception(_error(event))
            case ResidencyReport():
                for report in _open(filter(None, [self._reports.get(event.query_id)])):
                    report.set_result(event)

    def _on_tokens(self, event: Tokens, now: float) -> None:
        stream = self._streams.get(event.request_id)
        if stream is None:
            return
        if not stream.push(event, now):
            text = f"the stream was read too slowly: more than {self._queue_tokens} tokens were waiting"
            self._fail(stream, ResourceExhausted(text, reason="SLOW_READER", retry_after_s=1.0), now)
        elif stream.over:
            del self._streams[event.request_id]

    def _deliver_all(self, steps: list[StepEvents]) -> None:
        for step in steps:
            self.deliver(step)

    def _is_urgent(self, step: StepEvents) -> bool:
        """Whether anybody minds waiting for the next step. If nothing runs there may be none."""
        return not step.ran or not step.stats.running or any(map(self._is_awaited, step.events))

    def _is_awaited(self, event: Event) -> bool:
        """Anything but tokens in the middle of an answer. Asked on the step thread."""
        if not isinstance(event, Tokens):
            return True
        stream = self._streams.get(event.request_id)
        return event.finish is not None or stream is None or stream.first_token_at is None

    def _fail(self, stream: TokenStream, error: ChorusError, now: float) -> None:
        """Ends a stream that the engine still works on."""
        stream.fail(error, now)
        self._release(stream)

    def _end_output(self, stream: TokenStream, index: int) -> None:
        """Takes one output back from the engine; forgets the stream with its last one."""
        if stream.request_id not in self._streams:
            return
        if self._dead_of is None:
            self._port.send(Abort(stream.request_id, index))
        if stream.over:
            del self._streams[stream.request_id]

    def _release(self, stream: TokenStream) -> None:
        """Forgets a stream; aborts it unless the engine has ended it, or has ended itself."""
        if self._streams.pop(stream.request_id, None) is not None and self._dead_of is None:
            self._port.send(Abort(stream.request_id))

    async def _await_loaded(self, digest: str, command: Load | Pin) -> Loaded:
        future: asyncio.Future[Loaded] = self._loop.create_future()
        self._loads[digest].append(future)
        try:
            self._send(command)
            return await future
        finally:
            waiting = self._loads.get(digest)
            if waiting is not None:
                waiting[:] = [other for other in waiting if other is not future]
                if not waiting:
                    del self._loads[digest]

    def _send(self, command: Command) -> None:
        if self._dead_of is not None:
            raise fresh(self._dead_of)
        self._port.send(command)


def _open(futures: Iterable[asyncio.Future[T]]) -> list[asyncio.Future[T]]:
    return [future for future in futures if not future.done()]


def _error(event: Failed | LoadFailed) -> ChorusError:
    kind = BY_CODE.get(event.code, InternalError)
    return kind(event.message, reason=event.reason, retry_after_s=event.retry_after_s)
