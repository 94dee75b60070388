"""What every step of a scheduler must obey: none is overtaken, recomputed from a wrong place or preempted for nothing.

Says what it finds by failing. Everything is worked out from the model's tokens and counts, not from the scheduler's.
"""

from collections import Counter
from copy import deepcopy

from chorus.engine.schedule import Chunk, Schedule
from chorus.engine.sequence import Sequence
from support.scheduler_model import Expected, SchedulerModel


def scheduled(model: SchedulerModel) -> Schedule:
    """Lays out the next step of the model's scheduler, and checks it against the state before."""
    return StepChecks(model).schedule()


def ahead_of(model: SchedulerModel, schedule: Schedule, tokens: list[int]) -> Schedule | None:
    """Lays out the step after one that runs and will draw these tokens, if the model's scheduler can.

    Where no token ends anybody it has to be the step that a twin lays out who knows the tokens.
    """
    twin, twins = deepcopy((model, schedule))
    following = model.scheduler.ahead(schedule, model.now)
    if following is None:
        return None
    assert following[1:] == ((), (), ())
    for chunk in following.chunks:
        model.contents.write(chunk, spoiled=True)  # it may be for nobody; else it is written again when it is booked
    twin.advance(twins, tokens)
    if twin.live.keys() == {chunk.seq.key for chunk in following.chunks} | {e.seq.key for e in waiting_in(model)}:
        expected = twin.scheduler.schedule(twin.now)
        assert _work(following) == _work(expected)
        assert expected[1:] == ((), (), ())
    return following


def waiting_in(model: SchedulerModel) -> list[Expected]:
    return [e for e in model.live.values() if not e.seq.blocks]


def _work(schedule: Schedule) -> list[tuple[object, ...]]:
    return [(c.seq.key, c.start, c.count, c.samples, c.seq.slot, len(c.seq.blocks)) for c in schedule.chunks]


class StepChecks:
    """One step. Whoever `ran` before it, which adapters were there, and whether every decode could have its block."""

    def __init__(self, model: SchedulerModel) -> None:
        self.model, self.pool, self.limits = model, model.pool, model.limits
        self.resident = {digest for digest in model.gate.slots if digest != model.gate.yielding}
        self.ran = {e.seq for e in model.live.values() if e.seq.blocks}
        lacking = [s for s in self.ran if s.remaining == 1 and len(s.blocks) * self.pool.block_size < s.length]
        self.has_blocks = len(lacking) <= self.pool.free_count

    def schedule(self) -> Schedule:
        model = self.model
        schedule = model.scheduler.schedule(model.now)
        for request_id in schedule.expired:
            deadlines = {e.seq.deadline for key, e in model.live.items() if key[0] == request_id}
            assert all(deadline is not None and deadline <= model.now for deadline in deadlines)
        model.forget(set(schedule.expired))
        self.check_preempted(schedule)
        for chunk in schedule.chunks:
            if chunk.seq not in self.ran:
                self.check_admission(chunk)
        self.check_chunks(schedule)
        self.check_idle(schedule)
        self.check_order(schedule)
        self.check_urgent(schedule)
        return schedule

    def check_preempted(self, schedule: Schedule) -> None:
        """The least important go, the most recently admitted of them first, for lack of blocks or for somebody new."""
        live, gone = self.model.live, set(schedule.preempted)
        for seq in schedule.preempted:
            assert seq.output == live[seq.key].output
            live[seq.key].computed = 0
        here = [e for e in live.values() if e.seq in self.ran]
        order = sorted(here, key=lambda e: (e.seq.priority, e.admitted))
        assert {e.seq for e in order[len(order) - len(gone) :]} == gone
        joined = [chunk.seq.priority for chunk in schedule.chunks if chunk.seq not in self.ran]
        if self.has_blocks:
            assert all(seq.priority > min(joined, default=seq.priority) for seq in gone)

    def check_admission(self, chunk: Chunk) -> None:
        """Who joins starts behind full pages, and computes at least a token and every row that it has to tell of.

        If an output of its request runs, on its side, it starts behind their prompt's pages at least.
        """
        model, seq = self.model, chunk.seq
        expected, size = model.live[seq.key], self.pool.block_size
        pages = (len(seq.prompt) - 1) // size
        siblings = [
            e
            for key, e in model.live.items()
            if key[0] == seq.request_id and e.seq in self.ran and e.seq.blocks
            if model.is_long(e) == model.is_long(expected)
        ]
        assert chunk.start % size == 0
        assert chunk.start < expected.total
        reads = seq.sampling.prompt_logprobs is not None and not expected.output
        is_unlike_others = seq.prompt[0] >= 100 * 100
        if pages and siblings and not reads and is_unlike_others:
            assert chunk.start >= pages * size
            assert any(e.computed >= pages * size and e.seq.blocks[:pages] == seq.blocks[:pages] for e in siblings)
        expected.computed = chunk.start
        model.admissions += 1
        expected.admitted = model.admissions

    def check_chunks(self, schedule: Schedule) -> None:
        live = self.model.live
        assert sum(chunk.count for chunk in schedule.chunks) <= self.limits.budget
        assert len(schedule.chunks) <= min(self.limits.rows, self.limits.budget)
        assert len({chunk.seq.key for chunk in schedule.chunks}) == len(schedule.chunks)
        assert {chunk.seq for chunk in schedule.chunks}.isdisjoint(schedule.preempted)
        owners = Counter(block for e in live.values() for block in e.seq.blocks)
        for chunk in schedule.chunks:
            expected, end = live[chunk.seq.key], chunk.start + chunk.count
            assert chunk.start == expected.computed
            assert 1 <= chunk.count <= expected.total - chunk.start
            assert chunk.samples == (end == expected.total and expected.limit > 0)
            written = chunk.seq.blocks[chunk.start // self.pool.block_size : self.pool.blocks_for(end)]
            assert [owners[block] for block in written] == [1] * len(written)
            assert len(chunk.seq.blocks) >= self.pool.blocks_for(end)
            assert chunk.seq.deadline is None or chunk.seq.deadline > self.model.now
            self.model.contents.check(chunk)

    def check_idle(self, schedule: Schedule) -> None:
        """Who runs is in the step, but for prefills behind more important ones, and one decode that has no block."""
        at_work = {chunk.seq for chunk in schedule.chunks}
        idle = [e for e in self.model.live.values() if e.seq.blocks and e.seq not in at_work]
        decodes = [e for e in idle if e.total - e.computed == 1]
        assert len(decodes) == 0 or (len(decodes) == 1 and len(schedule.chunks) > 0 and self.pool.free_count == 0)
        for e in idle:
            first = [c.seq.priority for c in schedule.chunks if c.seq.remaining > 1 or c.seq not in self.ran]
            assert e in decodes or min(first) < e.seq.priority

    def check_order(self, schedule: Schedule) -> None:
        """None starts twice, and none that could run is overtaken, unless its pages are computed in this step."""
        for seq in schedule.started:
            assert seq.request_id not in self.model.started
            self.model.started.add(seq.request_id)
        able = [e for e in self.waiting() if e.seq.request_id not in self.model.started]
        at_work = {chunk.seq for chunk in schedule.chunks}
        for started in schedule.started:
            for e in able:
                is_before = (e.seq.priority, e.seq.ticket) < (started.priority, started.ticket)
                assert not is_before or self.leaders(e) & at_work

    def check_urgent(self, schedule: Schedule) -> None:
        """Who is in turn waits for a row or pages only where those no less important leave none, or by a bound."""
        queue = sorted(self.waiting(), key=lambda e: turn(e.seq))
        able = [e for e in queue if not self.leaders(e)]
        if not able or self.limits.bound is not None:
            return
        first = able[0]
        before = [c for c in schedule.chunks if c.count == 1 or c.seq.priority <= first.seq.priority]
        if sum(chunk.count for chunk in before) >= self.limits.budget:
            return
        if any(turn(seq) <= turn(first.seq) for seq in schedule.preempted):  # nobody passes them in this step
            return
        above = [e.seq for e in self.model.live.values() if e.seq.blocks and e.seq.priority <= first.seq.priority]
        used = len({block for seq in above for block in seq.blocks})
        # Who is before it and seems to wait for another's pages may have found them, and lack others.
        in_turn = [*queue[: queue.index(first)], first]
        has_pages = all(used + self.pool.blocks_for(e.total) + len(above) <= self.pool.num_blocks for e in in_turn)
        assert len(above) == min(self.limits.rows, self.limits.budget) or not has_pages

    def waiting(self) -> list[Expected]:
        """Those in the queue whose adapter is there."""
        waiting = waiting_in(self.model)
        return [e for e in waiting if e.seq.adapter is None or e.seq.adapter.digest in self.resident]

    def leaders(self, waiting: Expected) -> set[Sequence]:
        """Who runs and has pages still to compute that a waiting one can share, and is not behind it in the queue."""
        return {
            e.seq
            for e in self.model.live.values()
            if e.seq.blocks and self.is_before(e, waiting) and e.computed < self.shared_tokens(e, waiting)
        }

    def is_before(self, one: Expected, other: Expected) -> bool:
        first, second = one.seq, other.seq
        is_sibling = first.request_id == second.request_id
        return is_sibling or (first.priority, first.ticket) < (second.priority, second.ticket)

    def shared_tokens(self, one: Expected, other: Expected) -> int:
        """The tokens of full pages that hold the same for both, but for the other's last token."""
        alike = (one.seq.salt, one.seq.adapter, self.model.is_long(one)) == (
            other.seq.salt, other.seq.adapter, self.model.is_long(other)
        )  # fmt: skip
        if not alike or not (self.limits.cache or one.seq.request_id == other.seq.request_id):
            return 0
        pairs = zip(one.tokens, other.tokens[:-1], strict=False)
        common = next((i for i, (a, b) in enumerate(pairs) if a != b), min(one.total, other.total - 1))
        return common // self.pool.block_size * self.pool.block_size


def turn(seq: Sequence) -> tuple[int, bool, int]:
    """A waiting sequence's place in the queue: who has started before goes before its equals."""
    return seq.priority, not seq.started, seq.ticket
