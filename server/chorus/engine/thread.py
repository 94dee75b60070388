"""The step thread: the only one that touches torch, the pools and the scheduler."""

import logging
import queue
import threading
from collections.abc import Callable

import torch

from chorus.engine.engine import Engine
from chorus.engine.messages import Command, StepEvents

logger = logging.getLogger(__name__)

# How long an engine without work sleeps before it looks again at deadlines and at room for adapters, and rehearses a
# step, seconds.
_IDLE_WAIT = 0.05


class _Wake:
    """Not a command: only ends the wait."""


class EngineThread:
    """Steps an engine while there is work. `on_events` and `on_death` are called on the step thread."""

    def __init__(
        self,
        make_engine: Callable[[Callable[[], None]], Engine],
        on_events: Callable[[StepEvents], None],
        on_death: Callable[[BaseException], None],
        *,
        before_computing: Callable[[bool], None] = lambda has_prompts: None,
        threads: int | None = None,
    ) -> None:
        """`make_engine(wake)` builds the engine; it calls `wake` from any thread when there is something to do.

        `before_computing` is called on the step thread in each turn that computes, told whether prompts are in it.

        `threads` is how many cores a step takes; as many as torch took by now if None.
        """
        self._inbox: queue.SimpleQueue[Command | _Wake] = queue.SimpleQueue()
        self._engine = make_engine(lambda: self._inbox.put(_Wake()))
        self._engine.before_computing = before_computing
        self._on_events = on_events
        self._on_death = on_death
        self._stopping = threading.Event()
        self._threads = threads or torch.get_num_threads()
        self._thread = threading.Thread(target=self._loop, name="chorus-step", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def send(self, command: Command) -> None:
        """Hands a command to the engine; returns at once. From any thread."""
        self._inbox.put(command)

    def stop(self) -> None:
        """Ends the loop after the step under way, and waits for it."""
        self._stopping.set()
        self._inbox.put(_Wake())
        self._thread.join()
        self._engine.close()

    def _loop(self) -> None:
        torch.set_num_threads(self._threads)  # OpenMP's number is each thread's own; a loader may have set torch's
        try:
            while not self._stopping.is_set():
                commands = self._take()
                step = self._engine.step(commands)
                if step.ran or step.events or commands or step.stats.evictions:
                    self._on_events(step)
        except BaseException as error:
            logger.critical("the engine died", exc_info=error)
            self._on_death(error)

    def _take(self) -> list[Command]:
        """All commands that are waiting; sleeps for the first one when the engine has nothing to do."""
        taken: list[Command | _Wake] = []
        if not self._engine.has_work:
            try:
                taken.append(self._inbox.get(timeout=_IDLE_WAIT if self._engine.has_waiting else None))
            except queue.Empty:
                while self._inbox.empty() and self._engine.rehearse():
                    pass
        try:
            while True:
                taken.append(self._inbox.get_nowait())
        except queue.Empty:
            pass
        return [command for command in taken if not isinstance(command, _Wake)]
