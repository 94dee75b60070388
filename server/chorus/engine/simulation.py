"""The real scheduler and the real residency, with a cost model in the place of a device: for planning, and for tests.

    arrivals ──> Scheduler ──schedule──> Cost: the clock goes on by so much ──advance──> answers
                     └── Residency ── SimulatedPool (bytes)   SimulatedLoaders (seconds)

Time is a number that the simulation moves, so an hour of traffic takes as long as its bookkeeping. Answers are made of
one made-up token and run to their full length. Knows nothing of the front end: what the network and gRPC add to every
first token is a constant of the cost model, and what comes from a copy in host memory costs nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from chorus.adapters.pool import AdapterPool
from chorus.adapters.residency import NO_ADAPTER_ROOM, Residency
from chorus.adapters.resident import LoadedHost
from chorus.engine.engine import ResidencyGate
from chorus.engine.kv_cache import BlockPool
from chorus.engine.messages import AdapterRef, Sampling, Submit
from chorus.engine.schedule import Schedule
from chorus.engine.scheduler import Scheduler
from chorus.engine.sequence import outputs_of
from chorus.engine.simulated_device import Cost, SimulatedAdapter, SimulatedLoaders, SimulatedPool
from chorus.errors import ChorusError

TOKEN = 7
# The token of prompts' common beginnings; no request has this number.
SHARED = -1
# How long the engine sleeps at most while something waits that only time can bring.
IDLE_WAIT_S = 0.05


@dataclass(frozen=True, slots=True)
class SimulatedRequest:
    """Arrives `at` seconds with so many prompt tokens, and gets `new` tokens; `adapter` is None for the base."""

    at: float
    prompt: int
    new: int
    adapter: SimulatedAdapter | None = None
    priority: int = 0
    shared: int = 0
    """Tokens at the beginning of its prompt that all requests to its adapter have in common."""


@dataclass(slots=True)
class Answer:
    """What became of a request; times are seconds from the start. A refused or failed one has a code in `error`."""

    request: SimulatedRequest
    first_token: float | None = None
    finished: float | None = None
    tokens: int = 0
    waited_for_adapter: bool = False
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server is started with."""

    kv_blocks: int
    adapter_bytes: int
    adapter_host_bytes: int = 0
    block_size: int = 32
    max_rows: int = 64
    max_step_tokens: int = 512
    context_length: int = 1024
    max_queue: int = 1024


@dataclass(slots=True)
class Report:
    """`answers` in the order of the requests; `seconds` until the last one ended."""

    answers: list[Answer]
    seconds: float = 0.0
    steps: int = 0
    busy: float = 0.0
    """Seconds of all steps."""
    computed: int = 0
    """Tokens that steps computed, of prompts and answers."""
    preemptions: int = 0
    evictions: int = 0
    loads: int = 0
    from_host: int = 0
    """Loads that found a copy in host memory."""


class Simulation:
    """One engine on simulated time. `check` runs the invariants of scheduler and residency after every step."""

    def __init__(self, limits: Limits, cost: Cost, *, check: bool = False) -> None:
        self._cost = cost
        self._check = check
        self._sizes: set[int] = set()
        self._requests = 0
        self._adapters: dict[str, SimulatedAdapter] = {}
        self._pool = SimulatedPool(limits.adapter_bytes)
        self._loaders = SimulatedLoaders(lambda name: cost.load + cost.load_byte * self._adapters[name].size)
        self._residency = Residency(
            cast(AdapterPool, self._pool),
            self._load,
            host_bytes=limits.adapter_host_bytes,
            on_ready=self._wake,
            executor=self._loaders,
        )
        self._is_woken = False
        self._scheduler = Scheduler(
            pool=BlockPool(limits.kv_blocks, limits.block_size),
            gate=ResidencyGate(self._residency),
            max_rows=limits.max_rows,
            max_step_tokens=limits.max_step_tokens,
            context_length=limits.context_length,
            eos_token_ids=frozenset(),
            max_queue=limits.max_queue,
        )

    def run(self, requests: Sequence[SimulatedRequest]) -> Report:
        """Replays requests, sorted by time, until all are over. A second run finds the adapters of the first."""
        report = Report([Answer(request) for request in requests])
        now, arrived = 0.0, 0
        residency = self._residency
        evictions, loads, from_host = residency.evictions, self._pool.loads, residency.loads_from_host
        self._loaders.restart()
        while arrived < len(requests) or self._scheduler.running or self._scheduler.waiting:
            while arrived < len(requests) and requests[arrived].at <= now:
                self._add(arrived, report.answers[arrived], now)
                arrived += 1
            self._take_loads(now, report)
            schedule = self._scheduler.schedule(now)
            if not schedule.chunks and self._is_woken:
                continue
            if not schedule.chunks:
                next_arrival = requests[arrived].at if arrived < len(requests) else float("inf")
                waits = now + IDLE_WAIT_S if self._scheduler.waiting else float("inf")
                now = min(next_arrival, max(self._loaders.next_end(), now), waits)
                continue
            seconds = self._seconds(schedule)
            now += seconds
            report.busy += seconds
            self._book(schedule, now, report)
        report.seconds = now
        report.evictions, report.loads = residency.evictions - evictions, self._pool.loads - loads
        report.from_host = residency.loads_from_host - from_host
        return report

    def _seconds(self, schedule: Schedule) -> float:
        """What the step takes, more if it is the first of its size."""
        tokens = schedule.work().tokens
        is_new = tokens not in self._sizes
        self._sizes.add(tokens)
        return self._cost.seconds(schedule) + is_new * self._cost.new_size

    def _add(self, index: int, answer: Answer, now: float) -> None:
        request = answer.request
        ref = None
        if request.adapter:
            self._adapters[request.adapter.name] = request.adapter
            ref = AdapterRef(request.adapter.name, "")
        # Its own number, like nobody's before, is the rest of its prompt, so that no two share more.
        self._requests += 1
        prompt = (SHARED,) * request.shared + (self._requests,) * (request.prompt - request.shared)
        submit = Submit(index, prompt, Sampling(request.new, ignore_eos=True), ref, priority=request.priority)
        try:
            self._scheduler.add(outputs_of(submit, now), now)
        except ChorusError as error:
            answer.error = error.code

    def _take_loads(self, now: float, report: Report) -> None:
        self._loaders.advance(now)
        self._is_woken = False
        for outcome in self._residency.advance():
            if outcome.error and outcome.error.reason != NO_ADAPTER_ROOM:
                for request_id in self._scheduler.fail_adapter(outcome.digest):
                    report.answers[request_id].error = outcome.error.code

    def _book(self, schedule: Schedule, now: float, report: Report) -> None:
        report.steps += 1
        report.computed += schedule.work().tokens
        report.preemptions += len(schedule.preempted)
        for seq in schedule.started:
            report.answers[seq.request_id].waited_for_adapter = seq.adapter_wait > 0
        drawn = {chunk.seq.key: TOKEN for chunk in schedule.chunks if chunk.samples}
        for seq, finish in self._scheduler.advance(schedule, drawn):
            answer = report.answers[seq.request_id]
            answer.tokens += 1
            if answer.first_token is None:
                answer.first_token = now + self._cost.overhead
            if finish:
                answer.finished = now + self._cost.overhead
        if self._check:
            self._scheduler.check_integrity()
            self._residency.check_integrity()

    def _wake(self) -> None:
        """Residency has something to do."""
        self._is_woken = True

    def _load(self, name: str, _: str) -> LoadedHost:
        return LoadedHost(cast(Any, self._adapters[name]))
