"""Random requests, references, pins and unloads: what is held stays, and nothing leaks."""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from chorus.adapters.residency import Residency
from support.residency import COPY_8, assert_holds, load_by_name, make_pool


class LaterExecutor(Executor):
    """Runs what is submitted when it is told to, the first first."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        self.waiting.append((future, lambda: fn(*args, **kwargs)))
        return future

    def end_one(self) -> None:
        future, run = self.waiting.pop(0)
        if future.set_running_or_notify_cancel():
            future.set_result(run())


class ResidencyMachine(RuleBasedStateMachine):
    """Random requests, references, pins and unloads over five versions in a pool that holds two or three.

    Host memory holds as many copies.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = make_pool(rows=24)
        self.loads = LaterExecutor()
        self.residency = Residency(self.pool, load_by_name, host_bytes=3 * COPY_8, executor=self.loads, forget_turns=6)
        self.refs: dict[str, int] = {}

    digests = st.sampled_from("abcde")

    @rule(digest=digests)
    def acquire(self, digest: str) -> None:
        if self.residency.acquire(digest, str(4 + 4 * (ord(digest) - ord("a")))) is not None:
            self.refs[digest] = self.refs.get(digest, 0) + 1

    @precondition(lambda self: any(self.refs.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(d for d, n in self.refs.items() if n)))
        self.residency.release(digest)
        self.refs[digest] -= 1

    @rule(digest=digests, pinned=st.booleans())
    def pin(self, digest: str, pinned: bool) -> None:
        if pinned:
            self.residency.pin(digest, str(4 + 4 * (ord(digest) - ord("a"))))
        else:
            self.residency.unpin(digest)

    @rule(digest=digests)
    def unload(self, digest: str) -> None:
        self.residency.unload(digest)

    @rule()
    def step(self) -> None:
        self.residency.advance()

    @precondition(lambda self: self.loads.waiting)
    @rule()
    def a_load_ends(self) -> None:
        self.loads.end_one()

    @invariant()
    def what_requests_hold_is_on_the_device_and_pages_add_up(self) -> None:
        self.residency.check_integrity()
        for digest, count in self.refs.items():
            if count:
                assert self.residency.on_device(digest)
        for resident in self.residency.residents():
            if resident.slot is not None:
                assert_holds(self.pool, resident.slot, resident.digest)

    def teardown(self) -> None:
        for digest, count in self.refs.items():
            for _ in range(count):
                self.residency.release(digest)
        for digest in "abcde":
            self.residency.unload(digest)
        assert self.pool.rows_used == 0
        assert self.residency.counts == (0, 0, 0)
        self.residency.close()


TestResidency = ResidencyMachine.TestCase
TestResidency.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
