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


def decode_ms(engine: Engine, rows: Sequence[m.AdapterRef | None], prompt: int = PROMPT) -> float:
    """Median milliseconds of steps in which so many sequences decode, each over its own entry; None is the base.

    Their contexts are `prompt` tokens and a few more.
    """
    submits = [submit(next(_ids), adapter, prompt, 10 * STEPS) for adapter in rows]
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
    # In the first third kernels are compiled and a graph is recorded.
    return statistics.median(times[len(times) // 3 :]) * 1e3


def prefill_ms(engine: Engine, tokens: int, repeats: int = 5) -> float:
    """Median milliseconds of a step that computes a prompt of so many tokens and nothing else."""
    times = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        turns = [engine.step([submit(next(_ids), None, tokens, 1)])]
        while engine.has_work:  # where steps overlap, it ends in the next turn
            turns.append(engine.step([]))
        times.append(time.perf_counter() - began)
        if sum(turn.ran for turn in turns) != 1:
            raise RuntimeError(f"a prompt of {tokens} tokens took more than a step")
    return statistics.median(times[2:]) * 1e3


def submit(request_id: int, adapter: m.AdapterRef | None, prompt: int, new: int) -> m.Submit:
    """A request with a random prompt of so many tokens of a vocabulary of 8192 or of the toy's."""
    random = Random(request_id)
    tokens = tuple(random.randrange(20, or_toy(8000, 500)) for _ in range(prompt))
    return m.Submit(request_id, tokens, m.Sampling(new, temperature=0.0, ignore_eos=True), adapter)
