"""Engines for tests: small budgets, driven by hand."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from chorus.adapters import artifact as artifacts
from chorus.adapters.digest import version_digest
from chorus.engine import messages as m
from chorus.engine.engine import Engine
from chorus.engine.graphs import Record
from chorus.engine.memory import MemoryPlan
from chorus.models.base import load_base
from chorus.models.digest import base_digest


def reference(base: Path, adapter: Path) -> m.AdapterRef:
    """What the registry would say of an adapter pushed to a server with this base."""
    return m.AdapterRef(version_digest(artifacts.read(adapter), base_digest(base)), str(adapter))


@dataclass
class Run:
    """What a run gave: tokens by request id and by (request id, output), and what happened on the way."""

    outputs: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    events: list[m.Event] = field(default_factory=list)
    preemptions: int = 0
    evictions: int = 0
    most_adapters: int = 0
    most_blocks: int = 0
    launches: Counter[m.Launch] = field(default_factory=Counter)
    graphs: int = 0

    @property
    def tokens(self) -> dict[int, list[int]]:
        """The tokens of each request's first output."""
        return {request_id: tokens for (request_id, index), tokens in self.outputs.items() if index == 0}

    @property
    def failed(self) -> dict[int, m.Failed]:
        return {event.request_id: event for event in self.events if isinstance(event, m.Failed)}


def make_engine(
    base: Path,
    *,
    kv_blocks: int = 128,
    block_size: int = 4,
    adapter_rows: int = 256,
    max_rank: int = 64,
    max_rows: int = 16,
    max_step_tokens: int = 24,
    prefix_cache: bool = True,
    target_step_s: float | None = None,
    device: str = "cpu",
    record: Record | None = None,
    overlap: bool = False,
    wake: Callable[[], None] = lambda: None,
) -> Engine:
    """An fp32 engine whose prefills take several chunks."""
    memory = MemoryPlan(
        kv_blocks=kv_blocks, block_size=block_size, kv_bytes=0, adapter_rows=adapter_rows, context_length=256
    )
    return Engine(
        load_base(str(base), device=device, dtype="float32"),
        memory,
        max_rank=max_rank,
        max_rows=max_rows,
        max_step_tokens=max_step_tokens,
        max_queue=256,
        prefix_cache=prefix_cache,
        target_step_s=target_step_s,
        record=record,
        overlap=overlap,
        on_ready=wake,
    )


def hold(engine: Engine, adapters: Iterable[m.AdapterRef | None]) -> None:
    """Puts them on the device, so that those who ask for them start in the step that they come in."""
    wanted = {adapter for adapter in adapters if adapter}
    engine.step([m.Load(adapter) for adapter in wanted])
    while not all(engine.residency.on_device(adapter.digest) for adapter in wanted):
        engine.residency.wait(1.0)
        engine.step([])


def run(
    engine: Engine, arrivals: Mapping[int, list[m.Command]], *, may_fail: Collection[int] = (), max_steps: int = 2000
) -> Run:
    """Steps the engine, sending each step number's commands, until all requests have ended.

    Raises:
        AssertionError: a request failed that may not, failed twice, got something after its end, or did not end.
    """
    result = Run()
    submits = [c for commands in arrivals.values() for c in commands if isinstance(c, m.Submit)]
    open_outputs = {(submit.request_id, index) for submit in submits for index in range(submit.n)}
    for number in range(max_steps):
        commands = arrivals.get(number, [])
        for abort in [command for command in commands if isinstance(command, m.Abort)]:
            open_outputs -= {key for key in open_outputs if abort in (m.Abort(key[0]), m.Abort(*key))}
        step = engine.step(commands)
        result.events += step.events
        result.preemptions += step.stats.preemptions
        result.evictions += step.stats.evictions
        result.most_adapters = max(result.most_adapters, step.stats.distinct_adapters)
        result.most_blocks = max(result.most_blocks, engine.blocks.num_blocks - engine.blocks.free_count)
        result.launches.update(step.stats.launches)
        result.graphs = step.stats.graphs
        for event in step.events:
            assert not isinstance(event, m.LoadFailed), event
            if isinstance(event, m.Failed):
                assert event.request_id in may_fail, event
                assert event.request_id in {request_id for request_id, _ in open_outputs}, f"fails twice: {event}"
                open_outputs = {key for key in open_outputs if key[0] != event.request_id}
            elif isinstance(event, m.Tokens):
                key = event.request_id, event.index
                assert key in open_outputs, f"after its end: {event}"
                result.outputs.setdefault(key, []).extend(event.token_ids)
                if event.finish:
                    open_outputs.discard(key)
        engine.check_integrity()
        if not open_outputs and number >= max(arrivals):
            return result
        if not engine.has_work:
            engine.residency.wait(1.0)
    raise AssertionError(f"not ended after {max_steps} steps: {open_outputs}")
