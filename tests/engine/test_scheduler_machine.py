"""Arbitrary histories of the scheduler against what must hold in all of them.

A plain model beside it (`support.scheduler_model`) knows what each output has, and what every place of the KV cache was
computed from. After every step (`support.step_checks`) and every rule nothing is leaked, overtaken, recomputed from the
wrong place or forgotten, no page is written by two, and nobody is preempted but for somebody more important or for
blocks; when arrivals stop, everyone ends with exactly the tokens that were asked for.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from chorus.engine.messages import AdapterRef, Sampling
from chorus.engine.schedule import Schedule
from support.scheduler_model import Limits, SchedulerModel
from support.step_checks import ahead_of, scheduled

STOP_TOKENS = frozenset({1})
TENANTS = ["", "t", "u"]
ADAPTERS = [AdapterRef(digest, f"/{digest}") for digest in "abcd"]

LIMITS = st.builds(
    Limits,
    blocks=st.integers(2, 10) | st.integers(8, 20),
    block_size=st.integers(1, 3),
    rows=st.sampled_from([4, 3, 5, 2, 1]),
    budget=st.integers(4, 12) | st.integers(1, 4),
    context=st.sampled_from([40, 40, 20, 4]),
    queue=st.integers(6, 16) | st.integers(1, 6),
    slots=st.integers(1, 3),
    short=st.none() | st.integers(1, 20),
    cache=st.sampled_from([True, True, False]),
    bound=st.none() | st.integers(2, 10),
)


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(limits=LIMITS)
    def build(self, limits: Limits) -> None:
        self.model = SchedulerModel(limits)
        self.scheduler, self.gate = self.model.scheduler, self.model.gate

    @rule(
        prompt=st.integers(1, 12) | st.integers(1, 3),
        sampling=st.builds(
            Sampling,
            max_tokens=st.integers(1, 40) | st.just(40) | st.integers(0, 1),
            min_tokens=st.integers(0, 4),
            ignore_eos=st.booleans(),
            stop_token_ids=st.sampled_from([frozenset(), STOP_TOKENS]),
            prompt_logprobs=st.sampled_from([None, None, 0]),
        ),
        adapter=st.none() | st.none() | st.sampled_from(ADAPTERS),
        priority=st.integers(0, 2),
        patience=st.none() | st.none() | st.integers(0, 40),
        copies=st.integers(1, 4),
        n=st.just(1) | st.integers(1, 5),
        text=st.none() | st.integers(0, 2),
        tenant=st.sampled_from(TENANTS),
    )
    def add(
        self,
        prompt: int,
        sampling: Sampling,
        adapter: AdapterRef | None,
        priority: int,
        patience: int | None,
        copies: int,
        n: int,
        text: int | None,
        tenant: str,
    ) -> None:
        deadline = None if patience is None else self.model.now + patience
        for _ in range(copies):
            self.model.add(prompt, sampling, adapter, priority, deadline, n, text, tenant)

    @rule(
        prompt=st.integers(4, 12),
        new=st.integers(4, 40),
        reads=st.sampled_from([None, None, 0]),
        adapter=st.none() | st.sampled_from(ADAPTERS[:2]),
        n=st.integers(2, 5),
    )
    def add_several_outputs(self, prompt: int, new: int, reads: int | None, adapter: AdapterRef | None, n: int) -> None:
        """Adds what shares pages for a long time."""
        sampling = Sampling(new, ignore_eos=True, prompt_logprobs=reads)
        self.model.add(prompt, sampling, adapter, 1, None, n)

    @rule(
        prompts=st.lists(st.integers(4, 14), min_size=2, max_size=4),
        priorities=st.lists(st.integers(0, 2), min_size=4, max_size=4) | st.just([1] * 4),
        adapter=st.none() | st.sampled_from(ADAPTERS[:2]),
        text=st.integers(3, 4),
        patience=st.none() | st.integers(2, 40),
    )
    def add_alike(
        self, prompts: list[int], priorities: list[int], adapter: AdapterRef | None, text: int, patience: int | None
    ) -> None:
        """Adds requests that begin alike and come together."""
        deadline = None if patience is None else self.model.now + patience
        for prompt, priority in zip(prompts, priorities, strict=False):
            self.model.add(prompt, Sampling(3, ignore_eos=True), adapter, priority, deadline, 1, text)

    @rule(count=st.integers(1, 8), token=st.integers(2, 9))
    def run(self, count: int, token: int) -> None:
        """Runs some steps in peace."""
        for _ in range(count):
            self.model.advance(scheduled(self.model), [token] * 5)
            self.model.check_nothing_is_leaked_or_lost()

    @rule(data=st.data(), tokens=st.lists(st.integers(0, 40), min_size=5, max_size=5), passed=st.integers(0, 3))
    def step(self, data: st.DataObject, tokens: list[int], passed: int) -> None:
        """Runs a step; now and then someone aborts while it runs, or a part of it fails."""
        self.model.now += passed
        schedule = scheduled(self.model)
        accident = data.draw(st.sampled_from(["none", "none", "abort", "failure"]))
        if accident == "failure" and schedule.chunks:
            guilty = data.draw(
                st.sets(st.sampled_from(sorted({c.seq.request_id for c in schedule.chunks})), min_size=1)
            )
            self.model.spoil(schedule, guilty)
            assert self.scheduler.fail(sorted(guilty)) == sorted(guilty)
            self.model.forget(guilty)
        if accident == "abort" and self.model.live:
            self.abort(data)
        self.model.advance(schedule, tokens)

    @rule(data=st.data(), count=st.integers(1, 6), tokens=st.lists(st.integers(0, 40), min_size=5, max_size=5))
    def run_ahead(self, data: st.DataObject, count: int, tokens: list[int]) -> None:
        """Runs steps of which each is laid out before the one before is booked, as far as that goes; some abort."""
        following: Schedule | None = None
        for _ in range(count):
            schedule = following or scheduled(self.model)
            following = ahead_of(self.model, schedule, tokens)
            self.model.advance(schedule, tokens)
            self.model.check_nothing_is_leaked_or_lost()
            aborts: bool = data.draw(st.booleans())
            if aborts and self.model.live:
                self.abort(data)
        if following is not None:
            self.model.advance(following, tokens)

    @precondition(lambda self: self.model.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        live = self.model.live
        request_id, index = data.draw(st.sampled_from(sorted(live)))
        gone = {(request_id, index)}
        if data.draw(st.booleans()):
            assert self.scheduler.abort(request_id, index) == [live[request_id, index].seq]
        else:
            gone = {key for key in live if key[0] == request_id}
            assert {seq.key for seq in self.scheduler.abort(request_id)} == gone
        for key in gone:
            del live[key]
        assert self.scheduler.abort(request_id, index) == []

    @rule()
    def adapter_arrives(self) -> None:
        self.gate.arrive()

    @precondition(lambda self: self.gate.wanted)
    @rule(data=st.data())
    def adapter_fails(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(self.gate.wanted))
        self.gate.wanted.remove(digest)
        adapter = AdapterRef(digest, f"/{digest}")
        live = self.model.live.values()
        waiting = {e.seq.request_id for e in live if not e.seq.blocks and e.seq.adapter == adapter}
        failed = self.scheduler.fail_adapter(digest)
        assert sorted(failed) == sorted(waiting)
        self.model.forget(waiting)

    @invariant()
    def nothing_is_leaked_or_lost(self) -> None:
        if hasattr(self, "model"):
            self.model.check_nothing_is_leaked_or_lost()

    def teardown(self) -> None:
        """Arrivals stop, adapters come, nobody aborts: everyone ends, with all its tokens, in bounded time."""
        if not hasattr(self, "model"):
            return
        # One at a time, each may be computed anew once for every token of the others, and wait for all the adapters.
        tokens = sum(e.seq.max_length for e in self.model.live.values())
        bound = (len(self.model.live) + 1) * (tokens + 4 * len(ADAPTERS))
        for _ in range(bound):
            if not self.model.live:
                break
            self.gate.arrive()
            self.model.advance(scheduled(self.model), [7] * 5)
            self.model.check_nothing_is_leaked_or_lost()
        assert not self.model.live
        assert self.model.pool.usage == 0
        assert not +self.gate.refs


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
