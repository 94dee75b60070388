"""What stands in for a device, and for the disk before it, when the engine's decisions run on simulated time.

A step costs what a linear model says (`Cost`), device memory is a number of bytes (`SimulatedPool`), and loader
threads are times at which they are free (`SimulatedLoaders`). Knows nothing of requests.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from operator import mul
from typing import Any, NamedTuple

from chorus.adapters.residency import LOADERS
from chorus.engine.schedule import Schedule
from chorus.engine.sequence import NO_SLOT


class StepFeatures(NamedTuple):
    """What a step's time depends on; `adapted` is 1 where any row has an adapter, a prefill is a chunk of a prompt."""

    steps: float
    adapted: float
    rows: float
    adapters: float
    prompt_tokens: float
    prefills: float
    adapted_prefills: float

    @classmethod
    def of(cls, schedule: Schedule) -> "StepFeatures":
        prefills = [chunk for chunk in schedule.chunks if chunk.count > 1]
        adapters = len(schedule.slots())
        return cls(
            steps=1,
            adapted=min(adapters, 1),
            rows=len(schedule.chunks),
            adapters=adapters,
            prompt_tokens=sum(chunk.count for chunk in prefills),
            prefills=len(prefills),
            adapted_prefills=sum(chunk.seq.slot != NO_SLOT for chunk in prefills),
        )


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds: of a step, for each of its features, in their order; of a load, and for each of the adapter's bytes.

    `new_size` is what the first step of so many tokens takes longer: on a CPU oneDNN makes code for every shape that it
    has not seen. `overhead` is what lies around the engine: it is added to every token.
    """

    step: StepFeatures
    load: float = 0.0
    load_byte: float = 0.0
    overhead: float = 0.0
    new_size: float = 0.0

    def seconds(self, schedule: Schedule) -> float:
        return float(sum(map(mul, self.step, StepFeatures.of(schedule))))


@dataclass(frozen=True, slots=True)
class SimulatedAdapter:
    """An adapter as residency sees it: its name in the place of a digest, its bytes on the device."""

    name: str
    size: int
    kind: str = "lora"
    max_rank: int = 8
    site_count: int = 0

    @property
    def bytes(self) -> int:
        return self.size


class SimulatedPool:
    """Device memory in bytes; stands in for `AdapterPool` where residency is concerned."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._slots: dict[int, int] = {}
        self._next_slot = 0
        self.rows_used = 0
        self.loads = 0

    def check_integrity(self) -> None:
        """Raises AssertionError when bytes are miscounted."""
        assert self.rows_used == sum(self._slots.values()), "bytes are miscounted"

    def rows_of(self, adapter: SimulatedAdapter) -> int:
        return adapter.size

    def too_large(self, adapter: SimulatedAdapter) -> str | None:
        return "the device" if adapter.size > self._total else None

    def load(self, adapter: SimulatedAdapter) -> int | None:
        if self.rows_used + adapter.size > self._total:
            return None
        slot, self._next_slot = self._next_slot, self._next_slot + 1
        self._slots[slot] = adapter.size
        self.rows_used += adapter.size
        self.loads += 1
        return slot

    def evict(self, slot: int) -> None:
        self.rows_used -= self._slots.pop(slot)


class SimulatedLoaders(Executor):
    """Loader threads on simulated time: each takes the next load when it is done with its last."""

    def __init__(self, seconds: Callable[[str], float], loaders: int = LOADERS) -> None:
        self._seconds = seconds
        self._now = 0.0
        self._free_at = [0.0] * loaders
        self._waiting: deque[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = deque()
        self._loading: list[tuple[float, Future[Any], Callable[..., Any], tuple[Any, ...]]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **_: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._waiting.append((future, fn, args))
        self._start()
        return future

    def advance(self, now: float) -> None:
        """Moves the clock, ends what is due by then, and starts what waited for that."""
        self._now = now
        for load in [load for load in self._loading if load[0] <= now]:
            self._loading.remove(load)
            load[1].set_result(load[2](*load[3]))
        self._start()

    def restart(self) -> None:
        """The clock is at 0 again. Nothing is under way."""
        self._now, self._free_at = 0.0, [0.0] * len(self._free_at)

    def next_end(self) -> float:
        """When the next load ends; infinity if none is under way."""
        return min((load[0] for load in self._loading), default=float("inf"))

    def _start(self) -> None:
        while self._waiting:
            loader = min(range(len(self._free_at)), key=self._free_at.__getitem__)
            if self._free_at[loader] > self._now:
                break
            future, fn, args = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                self._free_at[loader] = self._now + self._seconds(args[0])
                self._loading.append((self._free_at[loader], future, fn, args))
