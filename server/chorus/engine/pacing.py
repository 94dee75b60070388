"""How often the engine tells what it did, so that messages do not cost more than the tokens in them.

Every message of a stream costs the front end and the caller about the same, however many tokens it holds, and on a
small machine it is the engine's cores that they take. So tokens in the middle of answers wait until everybody's
together would cost no more than SHARE of a core: alone, a stream gets every token as it comes; of 32 each gets a
message every 20 ms or so. First tokens, ends, errors and all else go at once, and take along what their requests have
waiting.

A turn in which somebody starts takes several times as long as others. What waits is told before such a one if that is
nearer to its time than after it.
"""

import time
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from chorus.engine.messages import Early, StepEvents

# Handler, detokenizer, protobuf, gRPC: measured with one token a message and 32 streams, on one core of an EPYC.
MESSAGE_S = 150e-6
SHARE = 0.25
# Readers should not notice.
LONGEST_S = 0.1
# Of what a turn with prompts is expected to take, the part that the last one makes up.
_NEWEST = 0.125


def pace(running: int) -> float:
    """Seconds between two messages of a stream when so many run."""
    return min(running * MESSAGE_S / SHARE, LONGEST_S)


class Pacer:
    """Holds what can wait, and posts several turns at once. Belongs to the step thread."""

    def __init__(self, post: Callable[[Sequence[StepEvents | Early]], None]) -> None:
        self._post = post
        self._held: list[StepEvents] = []
        self._posted_at = 0.0
        self._prompts_since: float | None = None  # of the turn under way, if there are prompts in it
        self._expected = 0.0  # seconds of such a turn

    def before_computing(self, has_prompts: bool, now: float | None = None) -> None:
        """The engine's: tells what waits if that is nearer to its time now than after prompts are computed."""
        if not has_prompts:
            self._prompts_since = None
            return
        self._prompts_since = now = time.monotonic() if now is None else now
        if self._held and now - self._posted_at + self._expected / 2 >= pace(self._held[-1].stats.running):
            self._tell(now)

    def take(self, step: StepEvents) -> None:
        """The engine's `on_events`."""
        if self._prompts_since is not None:
            self._expected += _NEWEST * (step.at - self._prompts_since - self._expected)
            self._prompts_since = None
        self._held.append(step)
        # Where nothing runs, or nothing ran, there may be no next turn.
        if not step.ran or not step.stats.running or step.at - self._posted_at >= pace(step.stats.running):
            self._tell(step.at)
        elif awaited := step.awaited:
            early = (self._early(turn, awaited) for turn in range(len(self._held)))
            self._post([part for part in early if part.events])

    def _tell(self, now: float) -> None:
        held, self._held = self._held, []
        self._posted_at = now
        self._post(held)

    def _early(self, turn: int, awaited: set[int | None]) -> Early:
        """Takes what is of those requests, and of none, out of a turn."""
        step = self._held[turn]
        early = tuple(e for e in step.events if getattr(e, "request_id", None) in awaited)
        if early:
            rest = tuple(e for e in step.events if getattr(e, "request_id", None) not in awaited)
            self._held[turn] = replace(step, events=rest)
        return Early(early, step.at)
