"""The engine: one step is one turn of the whole machine, and reads like the README's walk of a request."""

import logging
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

from chorus import failpoints
from chorus.adapters import kinds
from chorus.adapters.digest import read_verified
from chorus.adapters.pool import AdapterPool
from chorus.adapters.residency import NO_ADAPTER_ROOM, LoadedHost, LoadOutcome, Residency
from chorus.engine import messages as m
from chorus.engine.kv_cache import BlockPool
from chorus.engine.layout import Layout, lay_out
from chorus.engine.memory import MemoryPlan
from chorus.engine.runner import Runner
from chorus.engine.sampler import NOT_FINITE, sample
from chorus.engine.scheduler import Schedule, Scheduler
from chorus.engine.sequence import Sequence
from chorus.errors import ChorusError, DeadlineExceeded, InternalError
from chorus.models.base import Base

logger = logging.getLogger(__name__)


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
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self._eos = base.facts.eos_token_ids
        pool = AdapterPool(base.sites, rows=memory.adapter_rows, device=base.device, dtype=base.dtype)
        self._pool = pool
        self.residency = Residency(pool, _loader(base, max_rank), on_ready=on_ready)
        self.blocks = BlockPool(memory.kv_blocks, memory.block_size)
        self.scheduler = Scheduler(
            pool=self.blocks,
            gate=ResidencyGate(self.residency),
            max_rows=max_rows,
            max_step_tokens=max_step_tokens,
            context_length=memory.context_length,
            eos_token_ids=base.facts.eos_token_ids,
            max_queue=max_queue,
        )
        self._runner = Runner(base, pool, kv_blocks=memory.kv_blocks, block_size=memory.block_size)
        self._counted = (0, 0)  # evictions and hits that earlier steps have reported

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
        schedule = self.scheduler.schedule(began)
        events += [_failed(seq, DeadlineExceeded("the deadline passed")) for seq in schedule.expired]
        events += [m.Started(seq.request_id, began, seq.adapter_wait) for seq in schedule.started]
        for seq in schedule.started:
            if seq.adapter:
                self.residency.count_start(seq.adapter.digest, waited=seq.adapter_wait > 0)
        layout = lay_out(schedule.chunks)
        if schedule.chunks:
            events += self._run(schedule, layout)
        return m.StepEvents(tuple(events), self._stats(schedule, layout, began), ran=bool(schedule.chunks))

    def check_integrity(self) -> None:
        """Raises AssertionError when pages, references or rank rows do not add up."""
        self.scheduler.check_integrity()
        self.residency.check_integrity()

    def close(self) -> None:
        self.residency.close()

    def _run(self, schedule: Schedule, layout: Layout) -> list[m.Event]:
        try:
            failpoints.hit("engine.forward")
            logits = self._runner.forward(layout)
            tokens = sample(logits, [chunk.seq for chunk in layout.sampled], self._eos)
        except Exception as error:
            return self._fail_all([chunk.seq for chunk in schedule.chunks], error)
        by_request = {c.seq.request_id: token for c, token in zip(layout.sampled, tokens, strict=True)}
        events = self._fail_not_finite([c.seq for c in layout.sampled if by_request[c.seq.request_id] == NOT_FINITE])
        events += [
            m.Tokens(seq.request_id, (seq.output[-1],), finish)
            for seq, finish in self.scheduler.advance(schedule, by_request)
        ]
        return events

    def _fail_all(self, sequences: list[Sequence], error: Exception) -> list[m.Event]:
        incident = uuid.uuid4().hex[:12]
        logger.error("step failed, incident %s", incident, exc_info=error)
        self.scheduler.discard(sequences)
        return [_failed(seq, InternalError(f"the step failed; incident {incident}")) for seq in sequences]

    def _fail_not_finite(self, sequences: list[Sequence]) -> list[m.Event]:
        self.scheduler.discard(sequences)
        error = InternalError("the model's output is not finite", reason="NOT_FINITE")
        return [_failed(seq, error) for seq in sequences]

    def _apply(self, command: m.Command, now: float, events: list[m.Event]) -> None:
        match command:
            case m.Submit():
                self._submit(command, now, events)
            case m.Abort(request_id):
                self.scheduler.abort(request_id)
            case m.Load(adapter):
                self._request(adapter, events)
            case m.Pin(adapter):
                self.residency.pin(adapter.digest, adapter.path)
                self._request(adapter, events)
            case m.Unpin(digest):
                self.residency.unpin(digest)
            case m.Unload(digest):
                self.residency.unload(digest)
            case m.QueryResidency(query_id):
                events.append(self._residency_report(query_id))

    def _submit(self, command: m.Submit, now: float, events: list[m.Event]) -> None:
        seq = Sequence(
            request_id=command.request_id,
            prompt=command.prompt,
            sampling=command.sampling,
            adapter=command.adapter,
            priority=command.priority,
            deadline=command.deadline,
            arrival=now,
        )
        try:
            self.scheduler.add(seq, now)
        except ChorusError as error:
            events.append(_failed(seq, error))

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
            events += [_failed(seq, error) for seq in self.scheduler.fail_adapter(outcome.digest)]

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

    def _stats(self, schedule: Schedule, layout: Layout, began: float) -> m.StepStats:
        residents = self.residency.residents()
        evictions, hits = self._counted
        self._counted = (self.residency.evictions, self.residency.hits)
        return m.StepStats(
            seconds=time.monotonic() - began,
            rows=len(layout.rows),
            prompt_tokens=sum(max(min(c.start + c.count, len(c.seq.prompt)) - c.start, 0) for c in schedule.chunks),
            generated_tokens=len(layout.sampled),
            distinct_adapters=len(layout.slots),
            kinds=self.residency.kinds_of(layout.slots),
            preemptions=len(schedule.preempted),
            evictions=self.residency.evictions - evictions,
            adapter_hits=self.residency.hits - hits,
            running=self.scheduler.running,
            waiting=self.scheduler.waiting,
            waiting_for_adapter=self.scheduler.waiting_for_adapter,
            kv_usage=self.blocks.usage,
            pool_usage=self._pool.rows_used / self._pool.rows_total,
            resident_device=sum(r.slot is not None for r in residents),
            resident_host=sum(r.host is not None for r in residents),
            pinned=sum(r.pinned for r in residents),
        )


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


def _failed(seq: Sequence, error: ChorusError) -> m.Failed:
    return m.Failed(seq.request_id, error.code, error.reason, error.message, error.retry_after_s)
