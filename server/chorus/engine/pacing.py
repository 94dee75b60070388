"""How often the engine tells what it did, so that messages do not cost more than the tokens in them.

Every message of a stream costs the front end and the caller about the same, however many tokens it holds, and on a
small machine it is the engine's cores that they take. So tokens in the middle of answers wait until everybody's
together would cost no more than SHARE of a core: alone, a stream gets every token as it comes; of 32 each gets a
message every 20 ms or so. First tokens, ends, errors and all else go at once, and take along what has waited.
"""

from collections.abc import Callable, Sequence

from chorus.engine.messages import StepEvents

# Handler, detokenizer, protobuf, gRPC: measured with one token a message and 32 streams, on one core of an EPYC.
MESSAGE_S = 150e-6
SHARE = 0.25
# Readers should not notice.
LONGEST_S = 0.1


def pace(running: int) -> float:
    """Seconds between two messages of a stream when so many run."""
    return min(running * MESSAGE_S / SHARE, LONGEST_S)


class Pacer:
    """Holds what can wait, and posts several turns at once. Belongs to the step thread."""

    def __init__(self, post: Callable[[Sequence[StepEvents]], None]) -> None:
        self._post = post
        self._held: list[StepEvents] = []
        self._posted_at = 0.0

    def take(self, step: StepEvents) -> None:
        """The engine's `on_events`."""
        self._held.append(step)
        if not step.urgent and step.at - self._posted_at < pace(step.stats.running):
            return
        held, self._held = self._held, []
        self._posted_at = step.at
        self._post(held)
