"""A plain model of the scheduler's world: each output's tokens and how many are computed, from outside.

It drives a real scheduler and checks after each call that the two agree; `support.step_checks` has what a step must
obey. What every place of the KV cache was computed from is known too, and who holds references to adapters.
"""

from collections import Counter
from dataclasses import dataclass

from chorus.engine.kv_cache import BlockPool
from chorus.engine.messages import AdapterRef, FinishReason, Sampling, Submit, TokenLogprob
from chorus.engine.schedule import Chunk, Schedule
from chorus.engine.scheduler import Scheduler
from chorus.engine.sequence import Key, Sequence, outputs_of
from chorus.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, ResourceExhausted
from support.gates import LoadingGate
from support.kv_contents import KVContents

EOS = 0


@dataclass
class Expected:
    """What is known of an output from outside; `admitted` is its turn among all admissions, its last one."""

    seq: Sequence
    limit: int
    output: list[int]
    computed: int = 0
    admitted: int = 0

    @property
    def total(self) -> int:
        return len(self.seq.prompt) + len(self.output)

    @property
    def tokens(self) -> tuple[int, ...]:
        return (*self.seq.prompt, *self.output)


@dataclass(frozen=True)
class Limits:
    """What the scheduler is built with."""

    blocks: int
    block_size: int
    rows: int
    budget: int
    context: int
    queue: int
    slots: int
    short: int | None
    cache: bool
    bound: int | None


class SchedulerModel:
    """Everything that is `live`, and the scheduler that has it."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.pool, self.gate = BlockPool(limits.blocks, limits.block_size), LoadingGate(limits.slots)
        self.contents = KVContents(limits.block_size, limits.short)
        self.longest = min(limits.context, self.pool.capacity)
        self.scheduler = Scheduler(
            pool=self.pool,
            gate=self.gate,
            max_rows=limits.rows,
            max_step_tokens=limits.budget,
            context_length=limits.context,
            eos_token_ids=frozenset({EOS}),
            max_queue=limits.queue,
            short_length=limits.short,
            prefix_cache=limits.cache,
            target_step_s=limits.bound,
        )
        self.now, self.arrivals, self.admissions = 0.0, 0, 0
        self.live: dict[Key, Expected] = {}
        self.started: set[int] = set()

    def add(
        self,
        prompt: int,
        sampling: Sampling,
        adapter: AdapterRef | None = None,
        priority: int = 1,
        deadline: float | None = None,
        n: int = 1,
        text: int | None = None,
        tenant: str = "",
    ) -> None:
        """Adds a request; those of the same `text` have as much of their prompts in common as the shorter one has."""
        self.arrivals += 1
        tokens = tuple(100 * (self.arrivals + 100 if text is None else text) + i for i in range(prompt))
        submit = Submit(self.arrivals, tokens, sampling, adapter, priority, deadline, n, tenant)
        outputs = outputs_of(submit, self.now)
        too_long = prompt + min(sampling.max_tokens, 1) > self.longest
        room = self.limits.queue - self.scheduler.waiting
        try:
            self.scheduler.add(outputs, self.now)
        except InvalidArgument:
            assert too_long
        except FailedPrecondition:
            assert too_long or n > self.limits.queue
        except DeadlineExceeded:
            assert deadline is not None
        except ResourceExhausted:
            assert room < n <= self.limits.queue or deadline is not None
        else:
            assert not too_long
            assert n <= room
            limit = min(sampling.max_tokens, self.longest - prompt)
            self.live |= {seq.key: Expected(seq, limit, []) for seq in outputs}

    def is_long(self, expected: Expected) -> bool:
        """Whether the base rotates its positions by the long frequencies."""
        return self.limits.short is not None and expected.total > self.limits.short

    def forget(self, request_ids: set[int]) -> None:
        self.live = {key: e for key, e in self.live.items() if key[0] not in request_ids}

    def spoil(self, schedule: Schedule, guilty: set[int]) -> None:
        """The step fails after it has written; pages that the guilty alone have hold what nobody may ever read."""
        for chunk in schedule.chunks:
            self.contents.write(chunk, spoiled=True)
        owners = Counter(block for e in self.live.values() for block in set(e.seq.blocks))
        for expected in self.live.values():
            if expected.seq.request_id in guilty:
                for block in expected.seq.blocks:
                    if owners[block] == 1:
                        self.contents.spoil(block)

    def advance(self, schedule: Schedule, tokens: list[int]) -> None:
        """The step runs, but for those that are gone meanwhile, and its sampling rows draw these tokens."""
        work = schedule.work()
        self.scheduler.cost.observe(work, 1.0 + work.tokens)
        here = [chunk for chunk in schedule.chunks if chunk.seq.key in self.live]
        drawn = dict(zip([chunk.seq.key for chunk in here if chunk.samples], tokens, strict=False))
        for chunk in here:
            self.live[chunk.seq.key].computed += chunk.count
            self.contents.write(chunk)
            _tell(chunk)
        done = [chunk.seq.key for chunk in here if self.live[chunk.seq.key].computed == self.live[chunk.seq.key].total]
        results = self.scheduler.advance(schedule, drawn)
        assert [seq.key for seq, _ in results] == done
        for seq, finish in results:
            expected = self.live[seq.key]
            if seq.key in drawn:
                expected.output.append(drawn[seq.key])
            assert seq.output == expected.output
            assert finish == _finish(expected)
            if finish:
                del self.live[seq.key]
            elif expected.total - 1 == self.limits.short:
                expected.computed = 0
                assert not seq.blocks

    def check_nothing_is_leaked_or_lost(self) -> None:
        self.scheduler.check_integrity()
        running = [e.seq for e in self.live.values() if e.seq.blocks]
        held = Counter(seq.adapter.digest for seq in running if seq.adapter)
        assert held == +self.gate.refs
        assert self.scheduler.running == len(running)
        assert self.scheduler.running + self.scheduler.waiting == len(self.live)
        assert self.scheduler.waiting_for_adapter <= self.scheduler.waiting
        assert self.pool.free_count == self.pool.num_blocks - len({block for seq in running for block in seq.blocks})


def _tell(chunk: Chunk) -> None:
    """The prompt's rows that are to be told of come in order, each once, none passed over."""
    seq = chunk.seq
    if told := seq.untold_rows(chunk.start, chunk.count):
        assert told.start == len(seq.prompt_logprobs)
        seq.prompt_logprobs += [TokenLogprob(0.0)] * len(told)
    if seq.sampling.prompt_logprobs is not None and seq.computed + chunk.count == seq.length:
        assert len(seq.prompt_logprobs) == len(seq.prompt) - 1


def _finish(expected: Expected) -> FinishReason | None:
    sampling, output = expected.seq.sampling, expected.output
    stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else {EOS})
    if output and output[-1] in stops and len(output) > sampling.min_tokens:
        return FinishReason.STOP
    return FinishReason.LENGTH if len(output) == expected.limit else None
