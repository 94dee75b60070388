"""The engine: one step is one turn of the whole machine, and reads like the README's walk of a request."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from chorus import failpoints
from chorus.adapters import kinds
from chorus.adapters.checks import CheckOutcome, Checks, check
from chorus.adapters.digest import read_verified
from chorus.adapters.pool import AdapterPool
from chorus.adapters.records import CheckedAdapter
from chorus.adapters.residency import NO_ADAPTER_ROOM, LoadedHost, LoadOutcome, Residency
from chorus.engine import blame
from chorus.engine import messages as m
from chorus.engine.evaluate import Drawn, evaluate
from chorus.engine.graphs import Record
from chorus.engine.kv_cache import BlockPool
from chorus.engine.layout import lay_out
from chorus.engine.memory import MemoryPlan
from chorus.engine.runner import Runner
from chorus.engine.sampler import NOT_FINITE
from chorus.engine.schedule import Chunk, Sampled, Schedule
from chorus.engine.scheduler import Scheduler
from chorus.engine.sequence import Key, outputs_of
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


class Engine:
    """Owns the base model, the KV cache, the device's adapters and all sequences. Not thread-safe: one thread steps."""

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
        record: Record | None = None,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self._eos = base.facts.eos_token_ids
        pool = AdapterPool(base.sites, rows=memory.adapter_rows, device=base.device, dtype=base.dtype)
        self._pool = pool
        self.residency = Residency(pool, _loader(base, max_rank), on_ready=on_ready)
        self._checks = Checks(_checker(base, max_rank), on_ready=on_ready)
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
        self._counted = (0, 0, 0)  # evictions, hits and evicted pages that earlier steps have reported

    @property
    def has_work(self) -> bool:
        """True while a step would run something; False when only a command or a finished load can bring work."""
        return self.scheduler.running > 0 or self.scheduler.waiting > self.scheduler.waiting_for_adapter

    @property
    def has_waiting(self) -> bool:
        """True while time alone can bring work: a deadline, or room for an adapter that waits for it."""
        return self.scheduler.waiting > 0 or any(r.slot is None for r in self.residency.residents())

    def step(self, commands: Iterable[m.Command]) -> m.StepEvents:
        """Takes the commands in, runs the base once over what the scheduler chose, tells what came of it."""
        began = time.monotonic()
        events: list[m.Event] = []
        for command in commands:
            self._apply(command, began, events)
        for outcome in self.residency.advance():
            self._report_load(outcome, events)
        events += map(_checked, self._checks.advance())
        schedule = self.scheduler.schedule(began)
        events += [_failed(request_id, DeadlineExceeded("the deadline passed")) for request_id in schedule.expired]
        events += [m.Started(seq.request_id, began, seq.adapter_wait, seq.computed) for seq in schedule.started]
        for seq in schedule.started:
            if seq.adapter:
                self.residency.count_start(seq.adapter.digest, waited=seq.adapter_wait > 0)
        slots = schedule.slots()
        ready = time.monotonic()
        told = self._run(schedule) if schedule.chunks else []
        self.scheduler.cost.observe(schedule.work(), time.monotonic() - ready)
        stats = self._stats(schedule, slots, told, began)
        return m.StepEvents((*events, *told), stats, ran=bool(schedule.chunks))

    def check_integrity(self) -> None:
        """Raises AssertionError when pages, references or rank rows do not add up."""
        self.scheduler.check_integrity()
        self.residency.check_integrity()

    def close(self) -> None:
        self.residency.close()
        self._checks.close()

    def _run(self, schedule: Schedule) -> list[m.Event]:
        """Computes what was scheduled and books it; a request that can not be computed fails, the others go on."""
        drawn, guilty = blame.run(schedule.chunks, self._compute)
        events: list[m.Event] = []
        for request_ids, error in guilty:
            events += self._fail(request_ids, blame.charge(error))
        not_finite = [request_id for (request_id, _), it in drawn.items() if it.token == NOT_FINITE]
        events += self._fail(not_finite, InternalError("the model's output is not finite", reason="NOT_FINITE"))
        for sampled in self.scheduler.advance(schedule, {key: it.token for key, it in drawn.items()}):
            events += _told(sampled, drawn.get(sampled.seq.key))
        return events

    def _compute(self, chunks: Sequence[Chunk]) -> dict[Key, Drawn]:
        layout = lay_out(chunks)
        failpoints.hit("engine.forward", layout.token_ids)
        return evaluate(self._runner, layout, self._eos).tokens

    def _fail(self, request_ids: Iterable[int], error: ChorusError) -> list[m.Event]:
        """Ends those requests that are still here, all outputs of each with one event."""
        return [_failed(request_id, error) for request_id in self.scheduler.fail(request_ids)]

    def _apply(self, command: m.Command, now: float, events: list[m.Event]) -> None:
        match command:
            case m.Submit():
                try:
                    self.scheduler.add(outputs_of(command, now), now)
                except ChorusError as error:
                    events.append(_failed(command.request_id, error))
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

    def _report_load(self, outcome: LoadOutcome, events: list[m.Event]) -> None:
        error = outcome.error
        if error is None:
            events.append(m.Loaded(outcome.digest, outcome.seconds_by_stage))
            return
        events.append(m.LoadFailed(outcome.digest, error.code, error.reason, error.message, error.retry_after_s))
        if error.reason != NO_ADAPTER_ROOM:  # whoever waits for room asks again
            events += [_failed(request_id, error) for request_id in self.scheduler.fail_adapter(outcome.digest)]

    def _residency_report(self, query_id: int) -> m.ResidencyReport:
        return m.ResidencyReport(
            query_id=query_id,
            adapters=tuple(
                m.ResidentAdapter(r.digest, r.tier.value, r.bytes, r.rank_rows, r.max_rank, r.refs, r.pinned, r.hits)
                for r in self.residency.residents()
            ),
            rows_total=self._pool.rows_total,
            rows_used=self._pool.rows_used,
            bytes_total=self._pool.bytes_total,
            bytes_used=self._pool.bytes_used,
            kv_blocks_total=self.blocks.num_blocks,
            kv_blocks_used=self.blocks.num_blocks - self.blocks.free_count,
        )

    def _stats(self, schedule: Schedule, slots: set[int], told: list[m.Event], began: float) -> m.StepStats:
        residents, graphs = self.residency.residents(), self._runner.graphs
        evictions, hits, pages = self._counted
        self._counted = (self.residency.evictions, self.residency.hits, self.blocks.evictions)
        return m.StepStats(
            seconds=time.monotonic() - began,
            rows=len(schedule.chunks),
            prompt_tokens=sum(max(min(c.start + c.count, len(c.seq.prompt)) - c.start, 0) for c in schedule.chunks),
            generated_tokens=sum(len(event.token_ids) for event in told if isinstance(event, m.Tokens)),
            distinct_adapters=len(slots),
            kinds=self.residency.kinds_of(slots),
            preemptions=len(schedule.preempted),
            evictions=self.residency.evictions - evictions,
            adapter_hits=self.residency.hits - hits,
            running=self.scheduler.running,
            waiting=self.scheduler.waiting,
            waiting_for_adapter=self.scheduler.waiting_for_adapter,
            kv_usage=self.blocks.usage,
            kv_kept=self.blocks.kept_count / self.blocks.num_blocks,
            page_evictions=self.blocks.evictions - pages,
            pool_usage=self._pool.rows_used / self._pool.rows_total,
            resident_device=sum(r.slot is not None for r in residents),
            resident_host=sum(r.host is not None for r in residents),
            pinned=sum(r.pinned for r in residents),
            launches=graphs.take_launches() if graphs is not None else {},
            graphs=graphs.held if graphs is not None else 0,
        )


def _checker(base: Base, max_rank: int) -> Callable[[Path], CheckedAdapter]:
    """What a loader thread does with an uploaded folder."""
    sites = base.sites
    return lambda folder: check(folder, sites, base.facts.digest, max_rank=max_rank, base_weight=base.weight)


def _loader(base: Base, max_rank: int) -> Callable[[str, str], LoadedHost]:
    """What a loader thread does with an adapter's folder: read, check that it still is what was stored, lower, cast."""
    sites = base.sites

    def load(digest: str, path: str) -> LoadedHost:
        failpoints.hit("residency.load")
        began = time.monotonic()
        artifact = read_verified(Path(path), digest=digest, base_digest=base.facts.digest)
        was_read = time.monotonic()
        lowered = kinds.lower(artifact, sites, max_rank=max_rank, base_weight=base.weight)
        was_validated = time.monotonic()
        adapter = lowered.to(base.dtype)
        stages = (
            ("read", was_read - began),
            ("validate", was_validated - was_read),
            ("host", time.monotonic() - was_validated),
        )
        return LoadedHost(adapter, stages)

    return load


def _told(sampled: Sampled, drawn: Drawn | None) -> Iterator[m.Event]:
    """What the front end hears of a sequence's new token, or of the end of one that asked for none."""
    seq, finish = sampled
    if seq.sampling.prompt_logprobs is not None and len(seq.output) <= 1:
        yield m.PromptLogprobs(seq.request_id, tuple(seq.prompt_logprobs))
    logprobs = (drawn.logprob,) if drawn and drawn.logprob else ()
    yield m.Tokens(seq.request_id, tuple(seq.output[-1:]), finish, seq.index, logprobs, first=len(seq.output) == 1)


def _checked(outcome: CheckOutcome) -> m.Event:
    found = outcome.found
    if not isinstance(found, ChorusError):
        return m.Checked(outcome.check_id, found)
    fields = tuple((violation.field, violation.description) for violation in found.violations)
    return m.CheckFailed(outcome.check_id, found.code, found.reason, found.message, found.retry_after_s, fields)


def _failed(request_id: int, error: ChorusError) -> m.Failed:
    return m.Failed(request_id, error.code, error.reason, error.message, error.retry_after_s)
