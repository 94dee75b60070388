"""How long a decode step takes, stepped in this process."""

import itertools
import statistics
import time
from collections.abc import Sequence
from random import Random

from chorus.engine import messages as m
from chorus.engine.engine import Engine
from common import or_toy

PROMPT, STEPS = or_toy(64, 8), or_toy(24, 4)

_ids = itertools.count()


def decode_ms(engine: Engine, rows: Sequence[m.AdapterRef | None]) -> float:
    """Median milliseconds of steps in which so many sequences decode, each over its own entry; None is the base."""
    submits = [_submit(next(_ids), adapter) for adapter in rows]
    waiting = {submit.request_id for submit in submits}
    commands: list[m.Command] = list(submits)
    while waiting:  # for its first token
        waiting -= {event.request_id for event in engine.step(commands).events if isinstance(event, m.Tokens)}
        commands = []
    times = []
    for _ in range(STEPS):
        began = time.perf_counter()
        events = engine.step(()).events
        times.append(time.perf_counter() - began)
        if len(events) != len(rows):
            raise RuntimeError(f"{len(events)} of {len(rows)} rows had a token: {events[:1]}")
    engine.step([m.Abort(submit.request_id) for submit in submits])
    return statistics.median(times[2:]) * 1e3


def _submit(request_id: int, adapter: m.AdapterRef | None) -> m.Submit:
    random = Random(request_id)
    prompt = tuple(random.randrange(20, or_toy(8000, 500)) for _ in range(PROMPT))
    return m.Submit(request_id, prompt, m.Sampling(10 * STEPS, temperature=0.0, ignore_eos=True), adapter)
