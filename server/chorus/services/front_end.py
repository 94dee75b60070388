"""The front end of the engine: one event loop on this side, the engine's process on the other.

    handler ---submit---> EngineFrontEnd ---port.send---> engine
    handler <-TokenStream- EngineFrontEnd.deliver <--a few turns at once-- engine

Whoever asked gets an answer: tokens, an error of its own, or the error that the engine died of.
"""

import asyncio
import itertools
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from chorus.adapters.records import CheckedAdapter
from chorus.engine.messages import (
    Abort,
    AdapterRef,
    Check,
    Checked,
    CheckFailed,
    Command,
    Early,
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
from chorus.errors import BY_CODE, Aborted, ChorusError, FieldViolation, InternalError, ResourceExhausted
from chorus.metrics import Metrics
from chorus.services.lifecycle import fresh
from chorus.services.streams import StreamEnds, TokenStream

T = TypeVar("T")
Answer = Loaded | LoadFailed | ResidencyReport | Checked | CheckFailed


class EnginePort(Protocol):
    """What the front end needs of the engine. `send` never blocks."""

    def send(self, command: Command, /) -> None: ...


class EngineFrontEnd:
    """Sends commands, spreads answers. Belongs to the event loop."""

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
        self._checks: dict[int, asyncio.Future[CheckedAdapter]] = {}
        self._dead_of: ChorusError | None = None

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
        self._send(Submit(stream.request_id, prompt, sampling, adapter, priority, deadline, n, tenant or ""))
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

    async def check(self, folder: Path) -> CheckedAdapter:
        """What the adapter in a folder is. Raises what `adapters.checks.check` raises."""
        check_id = next(self._ids)
        future: asyncio.Future[CheckedAdapter] = self._loop.create_future()
        self._checks[check_id] = future
        try:
            self._send(Check(check_id, str(folder)))
            return await future
        finally:
            self._checks.pop(check_id, None)

    def deliver(self, steps: Iterable[StepEvents | Early]) -> None:
        """Spreads the events of some of the engine's turns."""
        for step in steps:
            for event in step.events:
                self._dispatch(event, step.at)
            if isinstance(step, StepEvents):
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
        waiting: list[asyncio.Future[Any]] = [*self._reports.values(), *self._checks.values()]
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
            case _:
                self._on_answer(event)

    def _on_answer(self, event: Answer) -> None:
        """What somebody waits for who has no stream."""
        match event:
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
            case Checked() | CheckFailed():
                for checked in _open(filter(None, [self._checks.get(event.check_id)])):
                    if isinstance(event, Checked):
                        checked.set_result(event.adapter)
                    else:
                        checked.set_exception(_error(event))

    def _on_tokens(self, event: Tokens, now: float) -> None:
        stream = self._streams.get(event.request_id)
        if stream is None:
            return
        if not stream.push(event, now):
            text = (
                f"the stream was read too slowly: more than {self._queue_tokens} tokens were waiting; "
                "read faster, or ask for fewer tokens at a time"
            )
            self._fail(stream, ResourceExhausted(text, reason="SLOW_READER", retry_after_s=1.0), now)
        elif stream.over:
            del self._streams[event.request_id]

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


def _error(event: Failed | LoadFailed | CheckFailed) -> ChorusError:
    kind = BY_CODE.get(event.code, InternalError)
    fields = event.violations if isinstance(event, CheckFailed) else ()
    violations = [FieldViolation(*pair) for pair in fields]
    return kind(event.message, reason=event.reason, retry_after_s=event.retry_after_s, violations=violations)
