"""A cost model of this machine's steps: the engine runs small batches of many shapes, and a line is fitted.

The line is that of steps whose number of tokens was seen before; what the first ones of their size take longer is a
figure of its own.
"""

import statistics
from collections.abc import Sequence
from operator import mul
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np

from chorus.config import ServerConfig
from chorus.engine import messages as m
from chorus.engine.engine import Engine
from chorus.engine.memory import MemoryPlan
from chorus.engine.schedule import Schedule
from chorus.engine.scheduler import Scheduler
from chorus.engine.simulated_device import Cost, StepFeatures
from loads.alone import alone, load_adapters
from loads.distinct import write_adapter

ROWS = (1, 4, 16, 32, 64)
ADAPTERS = (0, 1, 4, 16, 32)
PROMPT, NEW = (8, 128), (8, 64)
STEPS = 70


def calibrate(config: ServerConfig, shape: dict[str, int], folder: Path, ranks: list[int]) -> tuple[Cost, MemoryPlan]:
    """Fits steps of `ROWS` rows over so many `ADAPTERS`, and the median load; needs half a minute."""
    engine, base, memory = alone(config)
    folders = [write_adapter(shape, folder / str(i), i, ranks) for i in range(max(ADAPTERS))]
    refs, loaded = load_adapters(engine, base, folders)
    sizes: set[int] = set()
    steps = [step for rows in ROWS for n in ADAPTERS if n <= rows for step in _run(engine, rows, refs[:n], sizes)]
    engine.close()
    load = statistics.median(sum(spent for _, spent in event.seconds_by_stage) for event in loaded)
    line = fit(
        [step.features for step in steps if not step.is_new], [step.seconds for step in steps if not step.is_new]
    )
    longer = [step.seconds - sum(map(mul, line, step.features)) for step in steps if step.is_new]
    return Cost(line, load=load, new_size=max(statistics.median(longer), 0.0)), memory


def fit(features: Sequence[StepFeatures], seconds: Sequence[float]) -> StepFeatures:
    """Costs that are not negative, by least squares of relative errors: small steps count as much as large ones."""
    x, y = np.array(features), np.array(seconds)
    x, y = x / y[:, None], np.ones_like(y)
    kept = list(range(x.shape[1]))
    while True:
        costs = np.linalg.lstsq(x[:, kept], y, rcond=None)[0]
        if (costs >= 0).all():
            break
        kept = [column for column, cost in zip(kept, costs, strict=True) if cost >= 0]
    found = dict(zip(kept, costs.tolist(), strict=True))
    return StepFeatures(*(found.get(column, 0.0) for column in range(x.shape[1])))


class Step(NamedTuple):
    """One that ran; `is_new` if none before had as many tokens."""

    features: StepFeatures
    seconds: float
    is_new: bool


def _run(engine: Engine, rows: int, adapters: list[m.AdapterRef], sizes: set[int]) -> list[Step]:
    """Steps with so many requests under way; who ends is followed by another, so batches change as in real traffic."""
    random = Random(f"{rows} {len(adapters)}")

    def submit(request_id: int) -> m.Submit:
        prompt = tuple(random.randrange(20, 1000) for _ in range(random.randrange(*PROMPT)))
        sampling = m.Sampling(random.randrange(*NEW), temperature=0.0, ignore_eos=True)
        return m.Submit(request_id, prompt, sampling, random.choice(adapters) if adapters else None)

    features = _recorded(engine)
    commands = [submit(i) for i in range(rows)]
    steps: list[Step] = []
    added, ended = rows, 0
    while ended < added:
        step = engine.step(commands)
        finished = sum(isinstance(event, m.Tokens) and event.finish is not None for event in step.events)
        ended += finished
        refill = finished if len(steps) < STEPS else 0
        commands = [submit(added + i) for i in range(refill)]
        added += refill
        if features:
            described, tokens = features.pop()
            steps.append(Step(described, step.stats.seconds, tokens not in sizes))
            sizes.add(tokens)
    return steps[:STEPS]


def _recorded(engine: Engine) -> list[tuple[StepFeatures, int]]:
    """What the scheduler decides from now on is described in this list, with its tokens."""
    features: list[tuple[StepFeatures, int]] = []
    decide = Scheduler.schedule

    def schedule(now: float) -> Schedule:
        decided = decide(engine.scheduler, now)
        if decided.chunks:
            features.append((StepFeatures.of(decided), decided.work().tokens))
        return decided

    setattr(engine.scheduler, "schedule", schedule)  # noqa: B010 - a method is not assigned to
    return features
