"""The step thread tells of every turn that has something to tell."""

import threading
from collections.abc import Iterable
from typing import cast

from chorus.engine.engine import Engine
from chorus.engine.messages import Command, Loaded, StepEvents, StepStats
from chorus.engine.thread import EngineThread
from support.claims import until


class Turns:
    """An engine that has these turns, and no work after them."""

    has_waiting = False

    def __init__(self, *turns: StepEvents) -> None:
        self._turns = list(turns)
        self.are_over = threading.Event()
        self.rehearsals = 0

    @property
    def has_work(self) -> bool:
        if not self._turns:
            self.are_over.set()
        return bool(self._turns)

    def step(self, commands: Iterable[Command]) -> StepEvents:
        return self._turns.pop(0) if self._turns else StepEvents()

    def rehearse(self) -> bool:
        self.rehearsals += 1
        return False

    def close(self) -> None:
        pass


def test_turns_with_nothing_to_tell_are_passed_over_and_no_others() -> None:
    empty = StepEvents(stats=StepStats(running=1))
    loaded, ran, evicted = (
        StepEvents(events=(Loaded("digest"),)),
        StepEvents(ran=True),
        StepEvents(stats=StepStats(evictions=1)),  # room was made for a version, and is not enough yet
    )
    engine, told = Turns(empty, loaded, empty, ran, evicted, empty), list[StepEvents]()
    thread = EngineThread(lambda wake: cast(Engine, engine), told.append, lambda error: None)
    thread.start()
    assert engine.are_over.wait(10)
    thread.stop()
    assert told == [loaded, ran, evicted]


def test_without_work_and_word_steps_are_rehearsed_while_there_are_any() -> None:
    class Idle(Turns):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.has_waiting = 2, True

        def rehearse(self) -> bool:
            super().rehearse()
            self.left -= 1
            self.has_waiting = self.left > 0
            return self.has_waiting

    engine = Idle()
    thread = EngineThread(lambda wake: cast(Engine, engine), lambda step: None, lambda error: None)
    thread.start()
    until(lambda: not engine.left, "two rehearsals")
    thread.stop()
    assert engine.rehearsals == 2
