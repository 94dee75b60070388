"""A scheduler for tests with its pool and its adapters, without a model: every token is made up."""

from collections.abc import Mapping
from typing import Any

from chorus.engine.kv_cache import BlockPool
from chorus.engine.messages import AdapterRef, FinishReason, Sampling, Submit
from chorus.engine.schedule import Schedule
from chorus.engine.scheduler import Scheduler
from chorus.engine.sequence import Sequence, outputs_of
from support.gates import Gate

EOS, STOP_TOKEN, TOKEN = 0, 1, 7
A, B, C = (AdapterRef(digest, f"/{digest}") for digest in "abc")


class Bench:
    """A scheduler with its pool and gate; each step runs, and is checked before and after."""

    def __init__(self, *resident: AdapterRef, blocks: int = 64, block_size: int = 4, **limits: Any) -> None:
        self.pool, self.gate, self.ids = BlockPool(blocks, block_size), Gate(*resident), 0
        limits = {"max_rows": 8, "max_step_tokens": 32, "context_length": 128, "max_queue": 2000} | limits
        eos = frozenset({EOS})
        self.scheduler = Scheduler(pool=self.pool, gate=self.gate, eos_token_ids=eos, **limits)
        self.finished: list[tuple[Sequence, FinishReason]] = []

    def add(self, prompt: int = 4, new: int = 100, **options: Any) -> Sequence:
        """Adds a request of one output."""
        return self.add_outputs(1, prompt, new, **options)[0]

    def add_outputs(self, n: int, prompt: int = 4, new: int = 100, now: float = 0.0, **options: Any) -> list[Sequence]:
        """Adds a request of n outputs. Its prompt is like nobody else's, but for those of the same `text`."""
        names = ("adapter", "priority", "deadline", "salt")
        where = {name: options.pop(name) for name in names if name in options}
        self.ids += 1
        first = 1000 * options.pop("text", 1000 + self.ids)
        tokens = tuple(range(first, first + prompt))
        outputs = outputs_of(Submit(self.ids, tokens, Sampling(new, **options), n=n, **where), now)
        self.scheduler.add(outputs, now)
        return outputs

    def schedule(self, now: float = 0.0) -> Schedule:
        schedule = self.scheduler.schedule(now)
        self.scheduler.check_integrity()
        return schedule

    def step(self, now: float = 0.0, tokens: Mapping[int, int] | None = None) -> Schedule:
        """Runs a step; `tokens` maps request ids to what their outputs draw."""
        schedule = self.schedule(now)
        drawn = {c.seq.key: (tokens or {}).get(c.seq.request_id, TOKEN) for c in schedule.chunks if c.samples}
        for seq, finish in self.scheduler.advance(schedule, drawn):
            if finish:
                self.finished.append((seq, finish))
        self.scheduler.check_integrity()
        return schedule

    def steps(self, count: int) -> list[Schedule]:
        return [self.step() for _ in range(count)]

    def run_out(self, limit: int = 200) -> list[Schedule]:
        """Steps until everybody is over."""
        schedules = []
        while self.scheduler.running + self.scheduler.waiting:
            schedules.append(self.step())
            assert len(schedules) < limit, "somebody does not end"
        return schedules

    @property
    def used(self) -> int:
        """Blocks that somebody has."""
        return self.pool.num_blocks - self.pool.free_count


def work(schedule: Schedule) -> list[tuple[int, int, int, bool]]:
    return [(chunk.seq.request_id, chunk.start, chunk.count, chunk.samples) for chunk in schedule.chunks]


def scheduled(schedule: Schedule) -> list[Sequence]:
    return [chunk.seq for chunk in schedule.chunks]
