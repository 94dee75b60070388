"""Whom the queue sends into a step, with what they start, and who has to go for that.

    queue ──in turn──> adapter there? ──> next page being computed? ──> blocks, a row ──────────────────> step
              ^             no: next one         yes: aside until it is         none: the least important   │
              │                                                                 that runs goes, if it is    │
              └───────────────────────────────preempted─────────────────────────less important <────────────┘

Who goes for somebody more important does so in the step in which that one starts, and is behind it in the queue: so
nobody is preempted for nothing, nor comes back before. Equals never preempt each other.

Who is aside waits for a running output of its own request, or for a sequence that runs, arrived earlier and is no less
important: in every step that one goes on before whoever is behind it in the queue could, so the wait costs a step at
most, and is not begun where computing the pages costs less than that. Nobody waits for those who came later; so the
queue can not grow before somebody aside.

Knows the queue and what there is room for; does not know what else is in the step.
"""

from bisect import bisect_left, insort
from math import inf
from typing import NamedTuple

from chorus.engine.kv_cache import BlockPool
from chorus.engine.page_keys import PageKeys
from chorus.engine.requests import Requests
from chorus.engine.running import Running
from chorus.engine.schedule import Plan
from chorus.engine.sequence import NO_SLOT, Sequence
from chorus.engine.step_cost import StepCost, Work
from chorus.engine.waiting import Key as Rank
from chorus.engine.waiting import WaitingGroup, WaitingQueue, rank


class Wait(NamedTuple):
    """Until `leader`, which runs, has computed its first `until` tokens."""

    leader: Sequence
    until: int


class Refusal(NamedTuple):
    """Who was in turn and found no room, behind so many pages that it need not compute, beside so many who ran."""

    seq: Sequence
    found: int
    running: int


class Admission:
    """The queue before the running ones. `begin` a step, then `admit`, as often as there is somebody to go before."""

    def __init__(self, pool: BlockPool, keys: PageKeys, requests: Requests, running: Running, cost: StepCost) -> None:
        self._pool = pool
        self._keys = keys
        self._requests = requests
        self._running = running
        self._cost = cost
        self._heads: list[tuple[Rank, WaitingGroup]] = []
        self._now = 0.0
        self._refused: Refusal | None = None
        self.waiting = WaitingQueue()

    def begin(self, now: float) -> None:
        """Puts the queue in order, after those aside are back who wait for nothing any more."""
        self._now = now
        self._refused = None
        self.waiting.recall(self._running, now)
        self._heads = self.waiting.heads()

    def admit(self, plan: Plan, before: float = inf) -> None:
        """Starts waiting sequences of a priority before the given one in order, until one does not fit.

        Passes over those whose adapter is missing, and sets aside those whose pages are being computed. Looks at nobody
        twice in a step, and at nobody any more once one does not fit, or was preempted in this step.
        """
        heads = self._heads
        while heads and heads[0][0][0] < before and self._can_enter(heads[0][1].queue.first, plan):
            group = heads.pop(0)[1]
            seq = group.queue.first
            slot = self._running.acquire_adapter(seq)
            group.set_missing(slot is None, self._now)
            if slot is None:
                continue
            if wait := self._wait(seq):
                self._running.release_adapter(seq)
                self.waiting.set_aside(seq, wait.leader, wait.until)
            elif self._make_room(seq, plan):
                self._start(seq, slot, plan)
            else:
                self._running.release_adapter(seq)
                self._refused = self._refusal(seq)
                heads.clear()
                break
            if group.queue:
                insort(heads, (rank(group.queue.first), group))

    def is_closed(self, leaving: int) -> bool:
        """Whether nobody joins the next step, so many running ones having left, as far as that is easy to tell.

        Nobody is there, or has a row; or who is in turn had no room in the last step, and there is no more since: those
        who run only grow.
        """
        if len(self._requests) == len(self._running):
            return True
        heads = self.waiting.heads()
        if leaving or not heads or self.waiting.has_aside:
            return False
        first = heads[0][1].queue.first
        if self._running.less_important(first.priority):
            return False
        return not self._running.has_row() or self._refused == self._refusal(first)

    def send_back(self, seq: Sequence, now: float) -> None:
        """A running one to the front of its priority's queue: its tokens stay, what was computed of them is lost."""
        self._running.stop(seq)
        self.waiting.push(seq, now)

    def check_integrity(self) -> list[Sequence]:
        """Returns all waiting sequences; RuntimeError if one holds something, or the queue is broken."""
        waiting = self.waiting.check_integrity()
        for seq in waiting:
            if seq.blocks or seq.computed or seq.slot != NO_SLOT:
                raise RuntimeError(f"waiting sequence {seq.key} holds something")
        return waiting

    def _can_enter(self, seq: Sequence, plan: Plan) -> bool:
        """Whether the step has a token and a row for it, or somebody less important has."""
        if seq in plan.preempted or not plan.takes_prompts:
            return False
        return (plan.budget > 0 and self._running.has_row()) or bool(self._running.less_important(seq.priority))

    def _refusal(self, seq: Sequence) -> Refusal:
        return Refusal(seq, len(self._pool.find(self._needed(seq))), len(self._running))

    def _needed(self, seq: Sequence) -> list[bytes]:
        """The keys of the pages that it can start behind; those of all its full pages are known afterwards."""
        size = self._pool.block_size
        return self._keys.of(seq, seq.length // size)[: seq.first_needed // size]

    def _wait(self, seq: Sequence) -> Wait | None:
        """What to wait for before it starts: the first page that it lacks is being computed, and more perhaps."""
        needed, size = self._needed(seq), self._pool.block_size
        found = len(self._pool.find(needed))
        if found == len(needed):
            return None
        for other in self._running:
            if other.computed >= (found + 1) * size or other.page_keys[found : found + 1] != [needed[found]]:
                continue
            # A page's key stands for all before it, so the pages in common are the first ones.
            common = bisect_left(
                range(min(len(needed), len(other.page_keys))), True, key=lambda i: needed[i] != other.page_keys[i]
            )
            if self._should_wait(seq, other, (common - found) * size):
                return Wait(other, common * size)
        return None

    def _should_wait(self, seq: Sequence, other: Sequence, saved: int) -> bool:
        """Whether it waits for another to compute so many tokens for it.

        Always for an output of its request, with which it shares the memory, too. Otherwise not for who may be behind
        it, nor where the tokens take less time than the step that it may wait.
        """
        if other.request_id == seq.request_id:
            return True
        if (other.priority, other.ticket) > (seq.priority, seq.ticket):
            return False
        step = self._cost.seconds(Work(len(self._running)))
        return not self._cost.knows_tokens or saved * self._cost.per_token >= step

    def _make_room(self, seq: Sequence, plan: Plan) -> bool:
        """Gives a waiting sequence blocks for all it has, and sees that there is a row.

        If need be less important ones are preempted, one by one, where it fits in the end.
        """
        found = self._pool.find(self._needed(seq))
        if not self._fits(seq, found):
            less_important = self._running.less_important(seq.priority)
            if not less_important or not self._fits(seq, found, less_important):
                return False
            while not self._fits(seq, found):
                plan.preempt(last := less_important.pop())
                self.send_back(last, self._now)
        self._pool.share(seq, found)
        return self._pool.allocate_for(seq, seq.length)

    def _fits(self, seq: Sequence, found: list[int], without: list[Sequence] | None = None) -> bool:
        """Whether there is a row, and every running one can still grow by a block after that.

        Without that margin whoever comes last is preempted soon, and its prefill was for nothing: 300 requests of
        16-512 prompt and 16-256 new tokens in 512 blocks of 16 recompute 26 % of their tokens; with it 3 %, in 2 % more
        steps.
        """
        without = without or []
        margin = len(self._running) - len(without)
        return self._running.has_row(len(without)) and self._pool.room_after(found, seq.length, without) >= margin

    def _start(self, seq: Sequence, slot: int, plan: Plan) -> None:
        """From the queue into the step that is laid out."""
        self.waiting.remove(seq)
        self._running.start(seq, slot)
        if self._requests.start(seq):
            plan.started.append(seq)
        plan.compute(seq)
