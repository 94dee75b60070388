"""The engine: one step is one turn of the whole machine, and reads like the README's walk of a request."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from operator import sub
from pathlib import Path
from typing import NamedTuple

from chorus import failpoints
from chorus.adapters.checks import Checks, check
from chorus.adapters.digest import read_verified
from chorus.adapters.kinds import Lowering
from chorus.adapters.pool import AdapterPool
from chorus.adapters.residency import NO_ADAPTER_ROOM, Residency
from chorus.adapters.resident import LoadedHost, LoadOutcome, Resident
from chorus.engine import blame
from chorus.engine import messages as m
from chorus.engine.evaluate import Launched, launch
from chorus.engine.events import checked, failed, told
from chorus.engine.flight import Flight
from chorus.engine.graphs import Record
from chorus.engine.kv_cache import BlockPool
from chorus.engine.layout import lay_out
from chorus.engine.memory import MemoryPlan
from chorus.engine.runner import Runner
from chorus.engine.sampler import NOT_FINITE
from chorus.engine.schedule import Chunk, Schedule
from chorus.engine.scheduler import Scheduler
from chorus.engine.sequence import outputs_of
from chorus.errors import ChorusError, DeadlineExceeded, InternalError
from chorus.models.base import Base


class ResidencyGate:
    """What the scheduler sees of residency: slots by adapter reference."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency

    def acquire(self, adapter: m.AdapterRef) -> int | None:
        return self._residency.acquire(adapter.digest, adapter.path)

    def release(self, adapter: m.AdapterRef) -> None:
        self._residency.release(adapter.digest)


class Ended(NamedTuple):
    """A step that has ended, how long it took, and what there is to tell of it."""

    flight: Flight
    seconds: float
    told: list[m.Event]


class Counters(NamedTuple):
    """What only ever grows, and steps report the growth of."""

    evictions: int = 0
    host_evictions: int = 0
    hits: int = 0
    loads_from_disk: int = 0
    loads_from_host: int = 0
    pages: int = 0


class Engine:
    """Owns the base model, the KV cache, the device's adapters and all sequences. Not thread-safe: one thread steps.

    With `overlap` a step computes while the one before it is booked and told of (`engine.flight`).
    """

    def __init__(
        self,
        base: Base,
        memory: MemoryPlan,
        *,
        max_rank: int,
        max_rows: int,
        max_step_tokens: int,
        max_queue: int,
        prefix_cache: bool = True,
        target_step_s: float | None = None,
        adapter_host_bytes: int = 0,
        record: Record | None = None,
        overlap: bool = False,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self._eos = base.facts.eos_token_ids
        pool = AdapterPool(base.sites, rows=memory.adapter_rows, device=base.device, dtype=base.dtype)
        self._pool = pool
        lowering = Lowering(base.sites, max_rank=max_rank, base_weight=base.weight)
        self.residency = Residency(pool, _loader(base, lowering), host_bytes=adapter_host_bytes, on_ready=on_ready)
        self._checks = Checks(lambda folder: check(folder, lowering, base.facts.digest), on_ready=on_ready)
        self.blocks = BlockPool(memory.kv_blocks, memory.block_size)
        self.scheduler = Scheduler(
            pool=self.blocks,
            gate=ResidencyGate(self.residency),
            max_rows=max_rows,
            max_step_tokens=max_step_tokens,
            context_length=memory.context_length,
            eos_token_ids=base.facts.eos_token_ids,
            max_queue=max_queue,
            short_length=base.longrope.boundary if base.longrope else None,
            prefix_cache=prefix_cache,
            target_step_s=target_step_s,
        )
        self._runner = Runner(base, pool, kv_blocks=memory.kv_blocks, block_size=memory.block_size, record=record)
        self.before_computing: Callable[[bool], None] = lambda has_prompts: None
        """Called in a turn that computes, before it does; not where steps overlap, and it would wait for another."""
        self._in_flight = int(overlap)  # steps that the end of a turn leaves to the device
        self._flights: deque[Flight] = deque()
        self._ended_at = 0.0
        self._counted = Counters()  # what earlier steps have reported

    @property
    def has_work(self) -> bool:
        """True while a turn would do something; False when only a command or a finished load can bring work."""
        scheduler = self.scheduler
        return bool(self._flights) or scheduler.running > 0 or scheduler.waiting > scheduler.waiting_for_adapter

    @property
    def has_waiting(self) -> bool:
        """True while time alone can bring work: a deadline, room for an adapter that waits for it, a rehearsal."""
        return self.scheduler.waiting > 0 or self.residency.has_line or self._runner.can_rehearse

    def rehearse(self) -> bool:
        """For a moment without work: gets one step that has come ready to come again, in the time of several.

        False where there is none, or somebody waits.
        """
        return not self.scheduler.waiting and self._runner.rehearse()

    def step(self, commands: Iterable[m.Command]) -> m.StepEvents:
        """Takes the commands in, runs the base once over what the scheduler chose, tells what came of it.

        Where steps overlap, it tells what came of the step before.
        """
        began = time.monotonic()
        events: list[m.Event] = []
        for command in commands:
            self._apply(command, began, events)
        for outcome in self.residency.advance():
            self._report_load(outcome, events)
        events += map(checked, self._checks.advance())
        schedule, ended = self._ahead(began), None
        if schedule is None:
            ended = self._end(events, leave=0)
            schedule = self.scheduler.schedule(began)
        self._report_schedule(schedule, began, events)
        if schedule.chunks:
            if not self._in_flight:
                self.before_computing(schedule.has_prompts)
            before = self._flights[-1] if self._flights else None
            self._flights.append(Flight(schedule, began, self._launch, before))
        ended = self._end(events, leave=self._in_flight) or ended
        return m.StepEvents(tuple(events), self._stats(schedule, ended, began), ran=ended is not None)

    def check_integrity(self) -> None:
        """Raises AssertionError when pages, references or rank rows do not add up."""
        self.scheduler.check_integrity()
        self.residency.check_integrity()

    def close(self) -> None:
        self.residency.close()
        self._checks.close()

    def _ahead(self, now: float) -> Schedule | None:
        """The step behind the one in flight, if that can be launched before it ends."""
        flight = self._flights[-1] if self._flights else None
        return self.scheduler.ahead(flight.schedule, now) if flight and flight.launched else None

    def _launch(self, chunks: Sequence[Chunk], before: Launched | None) -> Launched:
        layout = lay_out(chunks, before.layout.sampled if before else ())
        failpoints.hit("engine.forward", layout.token_ids)
        return launch(self._runner, layout, self._eos, before)

    def _end(self, events: list[m.Event], *, leave: int) -> Ended | None:
        """Ends the first of more than so many steps in flight, and adds to the events what came of it."""
        if len(self._flights) <= leave:
            return None
        flight = self._flights.popleft()
        news = self._book(flight)
        events += news
        now, before = time.monotonic(), self._ended_at
        self.scheduler.cost.observe(flight.schedule.work(), now - max(flight.launched_at, before))
        self._ended_at = now
        return Ended(flight, now - max(flight.began, before), news)

    def _book(self, flight: Flight) -> list[m.Event]:
        """Waits for a step and books it; a request that can not be computed fails, the others go on."""
        chunks = self.scheduler.still_running(flight.schedule)
        drawn, guilty = blame.run(chunks, flight.compute)
        events: list[m.Event] = []
        for request_ids, error in guilty:
            events += self._fail(request_ids, blame.charge(error))
        tokens = {chunk.seq.key: drawn[chunk.seq.key].token for chunk in chunks if chunk.seq.key in drawn}
        not_finite = [request_id for (request_id, _), token in tokens.items() if token == NOT_FINITE]
        events += self._fail(not_finite, InternalError("the model's output is not finite", reason="NOT_FINITE"))
        for sampled in self.scheduler.advance(flight.schedule, tokens):
            events += told(sampled, drawn.get(sampled.seq.key))
        return events

    def _fail(self, request_ids: Iterable[int], error: ChorusError) -> list[m.Event]:
        """Ends those requests that are still here, all outputs of each with one event."""
        return [failed(request_id, error) for request_id in self.scheduler.fail(request_ids)]

    def _apply(self, command: m.Command, now: float, events: list[m.Event]) -> None:
        match command:
            case m.Submit():
                try:
                    self.scheduler.add(outputs_of(command, now), now)
                except ChorusError as error:
                    events.append(failed(command.request_id, error))
            case m.Abort(request_id, index):
                self.scheduler.abort(request_id, index)
            case m.Load(adapter):
                self._request(adapter, events)
            case m.Pin(adapter):
                self.residency.pin(adapter.digest, adapter.path)
                self._request(adapter, events)
            case m.Unpin(digest):
                self.residency.unpin(digest)
            case m.Unload(digest):
                self.residency.unload(digest)
            case m.Check(check_id, folder):
                self._checks.submit(check_id, folder)
            case m.QueryResidency(query_id):
                events.append(self._residency_report(query_id))

    def _request(self, adapter: m.AdapterRef, events: list[m.Event]) -> None:
        if self.residency.on_device(adapter.digest):
            events.append(m.Loaded(adapter.digest))
            return
        self.residency.request(adapter.digest, adapter.path)

    def _report_schedule(self, schedule: Schedule, now: float, events: list[m.Event]) -> None:
        events += [failed(request_id, DeadlineExceeded("the deadline passed")) for request_id in schedule.expired]
        events += [m.Started(seq.request_id, now, seq.adapter_wait, seq.computed) for seq in schedule.started]
        for seq in schedule.started:
            if seq.adapter:
                self.residency.count_start(seq.adapter.digest, waited=seq.adapter_wait > 0)

    def _report_load(self, outcome: LoadOutcome, events: list[m.Event]) -> None:
        error = outcome.error
        if error is None:
            events.append(m.Loaded(outcome.digest, outcome.seconds_by_stage))
            return
        events.append(m.LoadFailed(outcome.digest, error.code, error.reason, error.message, error.retry_after_s))
        if error.reason != NO_ADAPTER_ROOM:  # whoever waits for room asks again
            events += [failed(request_id, error) for request_id in self.scheduler.fail_adapter(outcome.digest)]

    def _residency_report(self, query_id: int) -> m.ResidencyReport:
        return m.ResidencyReport(
            query_id=query_id,
            adapters=tuple(map(self._resident_adapter, self.residency.residents())),
            rows_total=self._pool.rows_total,
            rows_used=self._pool.rows_used,
            bytes_total=self._pool.bytes_total,
            bytes_used=self._pool.bytes_used,
            kv_blocks_total=self.blocks.num_blocks,
            kv_blocks_used=self.blocks.num_blocks - self.blocks.free_count,
        )

    def _resident_adapter(self, version: Resident) -> m.ResidentAdapter:
        return m.ResidentAdapter(
            digest=version.digest,
            tier=version.tier.value,
            bytes=version.bytes,
            rank_rows=version.rank_rows,
            max_rank=version.max_rank,
            refs=version.refs,
            pinned=self.residency.is_pinned(version.digest),
            hits=version.hits,
        )

    def _stats(self, schedule: Schedule, ended: Ended | None, began: float) -> m.StepStats:
        """Of the step that has ended in this turn, if one has, and of what was scheduled and is there now."""
        chunks = ended.flight.schedule.chunks if ended else ()
        slots = ended.flight.slots if ended else set()
        versions, graphs = self.residency.counts, self._runner.graphs
        before, self._counted = self._counted, self._counters()
        grown = Counters(*map(sub, self._counted, before))
        return m.StepStats(
            seconds=ended.seconds if ended else time.monotonic() - began,
            rows=len(chunks),
            prompt_tokens=sum(max(min(c.start + c.count, len(c.seq.prompt)) - c.start, 0) for c in chunks),
            generated_tokens=sum(len(e.token_ids) for e in (ended.told if ended else ()) if isinstance(e, m.Tokens)),
            distinct_adapters=len(slots),
            kinds=self.residency.kinds_of(slots),
            preemptions=len(schedule.preempted),
            evictions=grown.evictions,
            host_evictions=grown.host_evictions,
            adapter_hits=grown.hits,
            loads_from_disk=grown.loads_from_disk,
            loads_from_host=grown.loads_from_host,
            running=self.scheduler.running,
            waiting=self.scheduler.waiting,
            waiting_for_adapter=self.scheduler.waiting_for_adapter,
            kv_usage=self.blocks.usage,
            kv_kept=self.blocks.kept_count / self.blocks.num_blocks,
            page_evictions=grown.pages,
            pool_usage=self._pool.rows_used / self._pool.rows_total,
            resident_device=versions.device,
            resident_host=versions.host,
            pinned=versions.pinned,
            launches=graphs.take_launches() if ended and graphs is not None else {},
            graphs=graphs.held if graphs is not None else 0,
        )

    def _counters(self) -> Counters:
        residency = self.residency
        return Counters(
            evictions=residency.evictions,
            host_evictions=residency.host_evictions,
            hits=residency.hits,
            loads_from_disk=residency.loads_from_disk,
            loads_from_host=residency.loads_from_host,
            pages=self.blocks.evictions,
        )


def _loader(base: Base, lowering: Lowering) -> Callable[[str, str], LoadedHost]:
    """What a loader thread does with an adapter's folder: read, check that it still is what was stored, fit, lower."""

    def load(digest: str, path: str) -> LoadedHost:
        failpoints.hit("residency.load")
        began = time.monotonic()
        artifact = read_verified(Path(path), digest=digest, base_digest=base.facts.digest)
        was_read = time.monotonic()
        fit = lowering.fit(artifact)
        was_validated = time.monotonic()
        adapter = fit.lower(artifact.tensors, base.dtype)
        stages = (
            ("read", was_read - began),
            ("validate", was_validated - was_read),
            ("host", time.monotonic() - was_validated),
        )
        return LoadedHost(adapter, stages)

    return load
