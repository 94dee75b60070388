"""Ctrl-C while an answer is read."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chorus.client import Stream


@contextmanager
def cancelled_by_ctrl_c(answer: "Stream") -> Iterator[None]:
    """Inside, Ctrl-C cancels the answer; KeyboardInterrupt comes at the end, whatever else came of it.

    An exception in the middle of an answer could come up inside gRPC, and be lost there: then the command went on.
    """
    interrupted = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        answer.cancel()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if interrupted:
            raise KeyboardInterrupt
