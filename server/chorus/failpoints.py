"""Named places where a test can make the server fail; inert unless `CHORUS_FAILPOINTS` is set.

`CHORUS_FAILPOINTS="inference.generate=error;residency.load=sleep:0.5;engine.forward=error@95"`. Actions: `error` raises
RuntimeError, `cancel` raises CancelledError, `memory` raises MemoryError, `device` raises what a lost device raises,
`sleep:SECONDS` waits, `kill` ends the process as `kill -9` would. `ACTION@TOKEN` acts only where the work at hand holds
that token id. A point may be armed more than once.
"""

import asyncio
import os
import signal
import time
from collections.abc import Collection
from functools import lru_cache
from typing import NamedTuple

VARIABLE = "CHORUS_FAILPOINTS"
_ACTIONS = ("error", "cancel", "memory", "device", "kill", "sleep")


class Rule(NamedTuple):
    """What happens at a point; with a `token`, only to work that holds it."""

    action: str
    seconds: float = 0.0
    token: int | None = None


@lru_cache(maxsize=8)
def parse(spec: str) -> dict[str, tuple[Rule, ...]]:
    """Point to rules. Raises ValueError for anything that is not a list of `name=action`."""
    points: dict[str, tuple[Rule, ...]] = {}
    for item in filter(None, (part.strip() for part in spec.split(";"))):
        name, _, rest = item.partition("=")
        rest, marked, token = rest.partition("@")
        action, _, seconds = rest.partition(":")
        if not name or action not in _ACTIONS or (action == "sleep") != bool(seconds):
            actions = ", ".join(f"name={action}" for action in _ACTIONS)
            raise ValueError(f"{VARIABLE}: {item!r} is not one of {actions}:SECONDS, with @TOKEN or without")
        rule = Rule(action, float(seconds or 0), int(token) if marked else None)
        points[name] = (*points.get(name, ()), rule)
    return points


def active() -> tuple[str, ...]:
    """The points that are armed, for the log at start."""
    return tuple(parse(os.environ.get(VARIABLE, "")))


def hit(name: str, tokens: Collection[int] = ()) -> None:
    """Does what `name` is armed with, on the calling thread; `tokens` are those of the work at hand."""
    if seconds := _act(name, tokens):
        time.sleep(seconds)


async def hit_async(name: str) -> None:
    """Like `hit`, without blocking the event loop."""
    if seconds := _act(name, ()):
        await asyncio.sleep(seconds)


def _act(name: str, tokens: Collection[int]) -> float:
    """Raises or kills; returns the seconds to sleep."""
    spec = os.environ.get(VARIABLE)
    if not spec:
        return 0.0
    seconds = 0.0
    for rule in parse(spec).get(name, ()):
        if rule.token is not None and rule.token not in tokens:
            continue
        match rule.action:
            case "error":
                raise RuntimeError(f"failpoint {name}")
            case "cancel":
                raise asyncio.CancelledError(f"failpoint {name}")
            case "memory":
                raise MemoryError(f"failpoint {name}")
            case "device":
                raise RuntimeError(f"CUDA error: failpoint {name}")
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
        seconds += rule.seconds
    return seconds
