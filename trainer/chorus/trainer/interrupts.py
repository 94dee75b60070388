"""SIGINT and SIGTERM: between steps they are a wish that the run heeds, elsewhere they end it at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(BaseException):
    """SIGTERM where there is nothing to finish: what KeyboardInterrupt is to SIGINT."""


class Stop:
    """A wish to stop: `signum` is the first signal that came while steps ran, None before."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._stepping = False

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """While steps run, a first signal only leaves the wish; a second one ends the process's work at once."""
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False

    def on_signal(self, signum: int, _frame: FrameType | None) -> None:
        """The handler."""
        if self._stepping and self.signum is None:
            self.signum = signum
        elif signum == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise Terminated


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Listens to both signals; the old handlers come back afterwards. For the main thread."""
    stop = Stop()
    before = {number: signal.signal(number, stop.on_signal) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Interrupted(Exception):
    """A run heeded a wish to stop: after `step` of `steps`, with a checkpoint at `checkpoint`."""

    def __init__(self, signum: int, step: int, steps: int, checkpoint: Path) -> None:
        super().__init__(f"stopped after step {step} of {steps}")
        self.signum, self.step, self.steps, self.checkpoint = signum, step, steps, checkpoint
