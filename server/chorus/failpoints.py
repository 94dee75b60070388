"""Named places where a test can make the server fail; inert unless `CHORUS_FAILPOINTS` is set.

`CHORUS_FAILPOINTS="inference.generate=error;residency.load=sleep:0.5;registry.commit=kill"`. Actions: `error` raises
RuntimeError, `cancel` raises CancelledError, `sleep:SECONDS` waits, `kill` ends the process as `kill -9` would.
"""

import asyncio
import os
import signal
import time
from functools import lru_cache

VARIABLE = "CHORUS_FAILPOINTS"


@lru_cache(maxsize=8)
def parse(spec: str) -> dict[str, tuple[str, float]]:
    """Point to (action, seconds). Raises ValueError for anything that is not a list of `name=action`."""
    points: dict[str, tuple[str, float]] = {}
    for item in filter(None, (part.strip() for part in spec.split(";"))):
        name, _, action = item.partition("=")
        action, _, seconds = action.partition(":")
        if not name or action not in {"error", "cancel", "sleep", "kill"} or (action == "sleep") != bool(seconds):
            raise ValueError(f"{VARIABLE}: {item!r} is not name=error, name=cancel, name=kill or name=sleep:SECONDS")
        points[name] = (action, float(seconds or 0))
    return points


def active() -> tuple[str, ...]:
    """The points that are armed, for the log at start."""
    return tuple(parse(os.environ.get(VARIABLE, "")))


def hit(name: str) -> None:
    """Does what `name` is armed with, on the calling thread."""
    if seconds := _act(name):
        time.sleep(seconds)


async def hit_async(name: str) -> None:
    """Like `hit`, without blocking the event loop."""
    if seconds := _act(name):
        await asyncio.sleep(seconds)


def _act(name: str) -> float:
    spec = os.environ.get(VARIABLE)
    if not spec:
        return 0.0
    action, seconds = parse(spec).get(name, ("", 0.0))
    if action == "error":
        raise RuntimeError(f"failpoint {name}")
    if action == "cancel":
        raise asyncio.CancelledError(f"failpoint {name}")
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return seconds
