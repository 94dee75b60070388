"""A step between its launch and its end. With `overlap` the next one is launched before that, where that is possible:

    turn       1            2                            3                            4
    host    launch n  | launch n+1, end n, tell n | launch n+2, end n+1, tell | end n+2, tell, launch n+3
    device      [ n ................... ][ n+1 ................... ][ n+2 ......... ]         [ n+3 ...

Of step n+1 all is known but what n draws: its rows are those of n that go on, one token further, and that token they
take from where n leaves it on the device (`layout.carried`). Turn 4 is one in which more than that decides: somebody
may join, has to leave or be preempted. Then n+2 ends first.

Whoever turns out to have ended in n, or is aborted or fails meanwhile, has a row in n+1 that nobody wants: its result
is passed over. Its pages and its adapter's place are free at once, although n+1 may not have begun. That is safe
because the device does one thing after the other: whoever gets the page or the place writes to it in a later step, or
by a copy that is queued later, and reads nothing there but what it has written, or has found by its key. A page that
can be found is full of tokens that were booked, and the row that nobody wants writes behind the last one of these.
"""

import time
from collections.abc import Callable, Sequence

from chorus.engine import blame
from chorus.engine.evaluate import Drawn, Launched
from chorus.engine.schedule import Chunk, Schedule
from chorus.engine.sequence import Key

Launch = Callable[[Sequence[Chunk], Launched | None], Launched]
"""Gives chunks to the device, behind a step that draws their tokens if that has not ended."""


class Flight:
    """A step that has been launched, `began` being when its turn of the engine did.

    Raises:
        Exception: the device is lost. What else goes wrong in launching is raised by `compute`.
    """

    def __init__(self, schedule: Schedule, began: float, launch: Launch, before: "Flight | None") -> None:
        self.schedule = schedule
        self.slots = schedule.slots()
        self.began = began
        self.launched_at = time.monotonic()
        self._launch = launch
        self._launched: Launched | Exception | None
        try:
            self._launched = launch(schedule.chunks, before.launched if before else None)
        except Exception as error:
            if blame.is_device_lost(error):
                raise
            self._launched = error

    @property
    def launched(self) -> Launched | None:
        """What another step can be launched behind, if it has come that far."""
        return self._launched if isinstance(self._launched, Launched) else None

    def compute(self, chunks: Sequence[Chunk]) -> dict[Key, Drawn]:
        """Waits for what was launched; asked again, computes the given chunks anew, for which all must be booked."""
        launched, self._launched = self._launched, None
        if launched is None:
            launched = self._launch(chunks, None)
        if isinstance(launched, Exception):
            raise launched
        return launched.read()
