"""Engines for tests: small budgets, driven by hand."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from chorus.adapters import artifact as artifacts
from chorus.adapters.digest import version_digest
from chorus.engine import messages as m
from chorus.engine.engine import Engine
from chorus.engine.memory import MemoryPlan
from chorus.models.base import load_base
from chorus.models.digest import base_digest


def reference(base: Path, adapter: Path) -> m.AdapterRef:
    """What the registry would say of an adapter pushed to a server with this base."""
    return m.AdapterRef(version_digest(artifacts.read(adapter), base_digest(base)), str(adapter))


@dataclass
class Run:
    """What a run gave: tokens by request id, and what happened on the way."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    preemptions: int = 0
    evictions: int = 0
    most_adapters: int = 0


def make_engine(
    base: Path,
    *,
    kv_blocks: int = 128,
    block_size: int = 4,
    adapter_rows: int = 256,
    max_rank: int = 64,
    max_rows: int = 16,
    max_step_tokens: int = 24,
    device: str = "cpu",
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
    )


def run(engine: Engine, arrivals: Mapping[int, list[m.Command]], *, max_steps: int = 2000) -> Run:
    """Steps the engine, sending each step number's commands, until all requests have ended.

    Raises:
        AssertionError: a request failed, or did not end.
    """
    result = Run()
    waiting = {c.request_id for commands in arrivals.values() for c in commands if isinstance(c, m.Submit)}
    for number in range(max_steps):
        step = engine.step(arrivals.get(number, []))
        result.preemptions += step.stats.preemptions
        result.evictions += step.stats.evictions
        result.most_adapters = max(result.most_adapters, step.stats.distinct_adapters)
        for event in step.events:
            assert not isinstance(event, m.Failed | m.LoadFailed), event
            if isinstance(event, m.Tokens):
                result.tokens.setdefault(event.request_id, []).extend(event.token_ids)
                if event.finish:
                    waiting.discard(event.request_id)
        engine.check_integrity()
        if not waiting and number >= max(arrivals):
            return result
        if not engine.has_work:
            engine.residency.wait(1.0)
    raise AssertionError(f"not ended after {max_steps} steps: {waiting}")
