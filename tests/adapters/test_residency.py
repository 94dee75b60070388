"""Residency: loads off the step thread, references, pins, least recently used first, nothing leaked."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from chorus.adapters.lowered import LoweredAdapter
from chorus.adapters.pool import AdapterPool
from chorus.adapters.residency import AHEAD, SITE_BYTES, Residency
from chorus.adapters.resident import LoadedHost, LoadOutcome
from chorus.errors import ChorusError, FailedPrecondition, ResourceExhausted
from chorus.kernels import SlotSegment
from chorus.models.sites import Site
from support.lowered import Factors, of_factors

SITES = {name: Site(name, 4, 6) for name in ("q", "v")}


def lowered(rank: int, fill: float = 1.0) -> LoweredAdapter:
    factors = Factors(torch.full((rank, 4), fill), torch.full((rank, 6), fill), 0.5)
    return of_factors({"q": factors, "v": factors})


def make_pool(rows: int = 32) -> AdapterPool:
    return AdapterPool(SITES, rows=rows, device=torch.device("cpu"), dtype=torch.float32)


def load_by_name(digest: str, path: str) -> LoadedHost:
    """Paths are "RANK" or "bad"; factors are all one number, another for each version."""
    if path == "bad":
        raise FailedPrecondition("bad adapter")
    return LoadedHost(lowered(int(path), number_of(digest)), (("host", 0.5),))


def number_of(digest: str) -> float:
    return float(1 + int.from_bytes(digest.encode(), "big") % 251)


def assert_holds(pool: AdapterPool, slot: int, digest: str) -> None:
    """The slot's rows of all sites have the version's numbers."""
    for (segment,), names in pool.layouts([SlotSegment(0, 1, slot)]):
        for name in names:
            a, b, scale = pool.pools[name]
            rows = list(segment.pool_rows)
            assert a[rows].eq(number_of(digest)).all()
            assert b[rows].eq(number_of(digest)).all()
            assert scale[rows].eq(0.5).all()


def settle(residency: Residency) -> list[LoadOutcome]:
    """Advances until no load is under way."""
    outcomes = residency.advance()
    while any(r.loading for r in residency.residents()):
        residency.wait(5)
        outcomes += residency.advance()
    return outcomes


def acquired(residency: Residency, digest: str, path: str = "8") -> int:
    residency.request(digest, path)
    settle(residency)
    slot = residency.acquire(digest, path)
    assert slot is not None
    return slot


def test_a_missing_version_is_loaded_off_the_step_thread_and_once() -> None:
    loading, release, calls = threading.Event(), threading.Event(), []

    def load(digest: str, path: str) -> LoadedHost:
        calls.append(threading.current_thread().name)
        loading.set()
        assert release.wait(5)
        return LoadedHost(lowered(8), (("host", 0.5),))

    residency = Residency(make_pool(), load)
    assert residency.acquire("a", "p") is None
    assert residency.acquire("a", "p") is None
    assert loading.wait(5)
    assert residency.advance() == []  # the step thread is not held up
    release.set()
    outcomes = settle(residency)
    assert [(o.digest, o.error) for o in outcomes] == [("a", None)]
    assert [stage for stage, _ in outcomes[0].seconds_by_stage] == ["host", "device"]
    assert residency.acquire("a", "p") is not None
    assert len(calls) == 1
    assert calls[0].startswith("chorus-loader")


def test_a_failed_load_is_told_and_can_be_tried_again() -> None:
    residency = Residency(make_pool(), load_by_name)
    residency.request("a", "bad")
    (outcome,) = settle(residency)
    assert isinstance(outcome.error, FailedPrecondition)
    assert acquired(residency, "a", "8") is not None


def test_a_bug_in_a_loader_does_not_show_its_text_but_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def load(digest: str, path: str) -> LoadedHost:
        raise KeyError("/secret/path")

    residency = Residency(make_pool(), load)
    residency.request("a", "p")
    (outcome,) = settle(residency)
    assert outcome.error is not None
    assert outcome.error.code == "INTERNAL"
    assert "secret" not in outcome.error.message
    incident = outcome.error.message.rsplit(" ", 1)[1]
    assert f"incident {incident}" in caplog.text
    assert "/secret/path" in caplog.text


def test_the_least_recently_used_free_version_makes_room() -> None:
    residency = Residency(make_pool(rows=24), load_by_name)
    for digest in "abc":
        acquired(residency, digest)
    residency.release("b")
    settle(residency)
    residency.release("a")
    settle(residency), settle(residency), settle(residency)
    acquired(residency, "d")
    assert {r.digest for r in residency.residents()} == {"a", "c", "d"}
    assert residency.evictions == 1


class Unlisted(dict[str, Any]):
    """Does not tell who is in it, only whether somebody is."""

    def __iter__(self) -> Any:
        raise AssertionError("a turn looks at every version")

    items = keys = values = __iter__


def test_a_turn_does_not_look_at_versions_that_only_lie_there() -> None:
    residency = Residency(make_pool(rows=32), load_by_name)
    slots = {acquired(residency, digest) for digest in "abc"}
    residency.release("a")
    residency._residents = Unlisted(residency._residents)
    residency.pin("b", "8")
    residency.request("d", "8")
    for _ in range(10):
        residency.wait(5)
        residency.advance()
    assert not residency.has_line
    assert residency.acquire("d", "8") is not None
    assert residency.counts == (4, 0, 1)
    assert residency.kinds_of(slots) == 1


def test_what_is_where_is_counted() -> None:
    residency = Residency(make_pool(rows=16), load_by_name)
    acquired(residency, "held")
    residency.pin("pinned", "8")
    settle(residency)
    residency.request("waits", "8")
    settle(residency)
    assert residency.counts == (2, 1, 1)
    assert residency.has_line
    assert (residency.is_pinned("pinned"), residency.is_pinned("held")) == (True, False)
    residency.unpin("pinned")
    residency.unload("waits")
    assert residency.counts == (2, 0, 0)
    assert not residency.has_line
    residency.pin("held", "8")
    residency.release("held")
    residency.unload("held")
    assert residency.counts == (1, 0, 0)
    residency.check_integrity()


def test_held_and_pinned_versions_stay_and_the_newcomer_waits_on_the_host() -> None:
    residency = Residency(make_pool(rows=16), load_by_name)
    acquired(residency, "held")
    residency.pin("pinned", "8")
    settle(residency)
    for _ in range(5):
        assert residency.acquire("new", "8") is None
        settle(residency)
    assert {r.digest: r.tier.value for r in residency.residents()} == {
        "held": "device",
        "pinned": "device",
        "new": "host",
    }
    residency.release("held")
    settle(residency), settle(residency), settle(residency)
    assert residency.acquire("new", "8") is not None


def test_versions_in_constant_use_yield_to_one_that_waits() -> None:
    """Two tenants always have a request running; a third one gets in all the same, and then they do again."""
    residency = Residency(make_pool(rows=16), load_by_name, patience_turns=3)
    for digest in "ab":
        acquired(residency, digest)
    served = {"a": 0, "b": 0, "c": 0}
    held = {"a": True, "b": True, "c": False}
    for _ in range(400):
        settle(residency)
        for digest in "abc":
            if residency.acquire(digest, "8") is not None:  # the next request comes before the last one ends
                served[digest] += 1
                if held[digest]:
                    residency.release(digest)
                held[digest] = True
            elif held[digest]:
                residency.release(digest)
                held[digest] = False
    assert min(served.values()) > 50, served


def test_small_versions_do_not_overtake_a_large_one_for_ever() -> None:
    residency = Residency(make_pool(rows=16), load_by_name, executor=InlineExecutor())
    acquired(residency, "held")
    residency.request("large", "16")
    residency.request("small", "8")
    settle(residency), settle(residency)
    assert {r.digest: r.tier.value for r in residency.residents()}["small"] == "host"
    residency.release("held")
    settle(residency), settle(residency), settle(residency)
    assert residency.on_device("large")


def test_unloading_waits_for_the_last_reference() -> None:
    pool = make_pool()
    residency = Residency(pool, load_by_name)
    acquired(residency, "a")
    residency.unload("a")
    assert residency.on_device("a")
    residency.release("a")
    assert not residency.residents()
    assert pool.rows_used == 0


def test_an_unload_is_taken_back_by_a_new_request() -> None:
    residency = Residency(make_pool(), load_by_name)
    acquired(residency, "a")
    residency.unload("a")
    assert residency.acquire("a", "8") is not None
    residency.release("a")
    residency.release("a")
    assert residency.on_device("a")


def test_an_adapter_larger_than_the_pool_is_refused_by_site() -> None:
    residency = Residency(make_pool(rows=16), load_by_name)
    residency.request("a", "17")
    (outcome,) = settle(residency)
    assert isinstance(outcome.error, FailedPrecondition)
    assert "q" in outcome.error.message


class Reader:
    """Loads by name, and remembers what it was asked to read."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def __call__(self, digest: str, path: str) -> LoadedHost:
        self.read.append(digest)
        return load_by_name(digest, path)


# What `lowered(8)` takes in float32: A and B at two sites. And what a copy of it is counted as.
BYTES_8 = 2 * 8 * (4 + 6) * 4
COPY_8 = BYTES_8 + 2 * SITE_BYTES


def visited(residency: Residency, digest: str, path: str = "8") -> LoadOutcome:
    """Asks for a version until it has come to the device, and leaves it there."""
    residency.request(digest, path)
    outcomes = [outcome for _ in range(4) for outcome in settle(residency)]
    residency.check_integrity()
    (outcome,) = (outcome for outcome in outcomes if outcome.digest == digest)
    return outcome


def test_what_was_evicted_comes_back_without_being_read() -> None:
    reader, pool = Reader(), make_pool(rows=8)
    residency = Residency(pool, reader, host_bytes=2 * COPY_8, executor=InlineExecutor())
    for digest in "ab":
        assert [stage for stage, _ in visited(residency, digest).seconds_by_stage] == ["host", "device"]
    assert [stage for stage, _ in visited(residency, "a").seconds_by_stage] == ["device"]
    assert reader.read == ["a", "b"]
    assert (residency.evictions, residency.host_evictions) == (2, 0)
    assert (residency.loads_from_disk, residency.loads_from_host) == (2, 1)
    assert residency.counts == (1, 2, 0)
    assert {r.digest: (r.tier.value, r.bytes, r.max_rank) for r in residency.residents()} == {
        "a": ("device", BYTES_8, 8),
        "b": ("host", BYTES_8, 8),
    }
    slot = residency.acquire("a", "8")
    assert slot is not None
    assert_holds(pool, slot, "a")


def test_who_asks_for_a_version_with_a_copy_does_not_wait_for_anything_else() -> None:
    """An engine without work sleeps until it is woken."""
    woken: list[None] = []
    residency = Residency(
        make_pool(rows=8),
        load_by_name,
        host_bytes=2 * COPY_8,
        on_ready=lambda: woken.append(None),
        executor=InlineExecutor(),
    )
    visited(residency, "a")
    visited(residency, "b")
    before = len(woken)
    assert residency.acquire("a", "8") is None
    assert len(woken) == before + 1
    (outcome,) = residency.advance()
    assert outcome.digest == "a"
    assert residency.acquire("a", "8") is not None


def test_the_copy_used_least_recently_makes_room_and_one_without_room_is_read_again() -> None:
    reader = Reader()
    residency = Residency(make_pool(rows=8), reader, host_bytes=2 * COPY_8, executor=InlineExecutor())
    for digest in "abac":  # b is the one that goes
        visited(residency, digest)
    assert residency.host_evictions == 1
    for digest in "acb":
        visited(residency, digest)
    assert reader.read == ["a", "b", "c", "b"]


def test_of_what_leaves_the_device_the_copy_stays() -> None:
    """It is the oldest copy, but nobody asked for it as long as the version was on the device."""
    reader = Reader()
    residency = Residency(make_pool(rows=16), reader, host_bytes=2 * COPY_8, executor=InlineExecutor())
    for digest in "ab":
        acquired(residency, digest)
    residency.release("a")
    visited(residency, "c")
    assert {r.digest: r.tier.value for r in residency.residents()} == {"b": "device", "c": "device", "a": "host"}
    visited(residency, "a")
    assert reader.read == ["a", "b", "c"]


def test_a_copy_larger_than_host_memory_is_not_kept() -> None:
    reader = Reader()
    residency = Residency(make_pool(rows=16), reader, host_bytes=COPY_8, executor=InlineExecutor())
    visited(residency, "small")
    visited(residency, "large", "16")
    visited(residency, "small")
    visited(residency, "large", "16")
    assert reader.read == ["small", "large", "large"]
    assert residency.counts == (1, 1, 0)


def test_an_unloaded_version_leaves_host_memory_too() -> None:
    reader = Reader()
    residency = Residency(make_pool(rows=8), reader, host_bytes=8 * COPY_8, executor=InlineExecutor())
    visited(residency, "a")
    visited(residency, "b")
    residency.unload("a")
    assert residency.counts == (1, 1, 0)
    residency.unload("b")
    assert residency.counts == (0, 0, 0)
    assert not residency.residents()
    visited(residency, "a")
    assert reader.read == ["a", "b", "a"]


def test_who_waits_with_a_copy_holds_none_and_waits_for_nobodys_load() -> None:
    """All copies stay within their memory, however many wait; and loads before it in line take their time."""
    names = [f"v{i}" for i in range(AHEAD + 3)]
    residency = Residency(
        make_pool(rows=8), load_by_name, host_bytes=len(names) * COPY_8, executor=(executor := InlineExecutor())
    )
    for name in names:
        visited(residency, name)
    executor.is_stuck = True
    for i in range(AHEAD + 1):
        residency.request(f"new-{i}", "8")
    for name in names[:-1]:
        residency.request(name, "8")
    assert {r.digest: r.tier.value for r in residency.residents()} == {
        names[-1]: "device",
        **dict.fromkeys(names[:-1], "host"),
        **{f"new-{i}": "loading" for i in range(AHEAD + 1)},
    }
    assert all(resident.host is None for resident in residency._residents.values())
    came = [outcome.digest for _ in range(40) for outcome in residency.advance()]
    assert came == names[:-1]
    residency.check_integrity()


def test_a_step_copies_few_versions_and_the_next_ones_the_rest() -> None:
    names, woken = [f"v{i}" for i in range(2 * AHEAD + 1)], list[None]()
    residency = Residency(
        make_pool(rows=8 * len(names)),
        load_by_name,
        host_bytes=len(names) * COPY_8,
        on_ready=lambda: woken.append(None),
        executor=InlineExecutor(),
    )
    for name in names:
        visited(residency, name)
    for resident in list(residency._on_device.values()):
        residency._drop(resident)
    for name in names:
        residency.request(name, "8")
    came = []
    for _ in range(4):
        woken.clear()
        came.append(([outcome.digest for outcome in residency.advance()], bool(woken)))
    assert came == [(names[:4], True), (names[4:8], True), (names[8:], False), ([], False)]
    assert residency.loads_from_host == len(names)


def test_a_copy_that_goes_while_its_version_waits_is_read_again() -> None:
    reader = Reader()
    residency = Residency(make_pool(rows=16), reader, host_bytes=2 * COPY_8, executor=InlineExecutor(), forget_turns=3)
    visited(residency, "a")
    for digest in "bc":  # in the place of a, whose copy stays, and that of c
        acquired(residency, digest)
    assert residency.acquire("a", "8") is None
    residency._copies.drop("a")
    residency.advance()
    assert {r.digest: r.tier.value for r in residency.residents()}["a"] == "loading"
    residency.advance()
    assert {r.digest: r.tier.value for r in residency.residents()}["a"] == "host"
    residency.check_integrity()
    residency.release("b")
    for _ in range(4):
        residency.request("a", "8")
        residency.advance()
    assert residency.on_device("a")
    assert reader.read == ["a", "b", "c", "a"]


def test_of_who_waits_the_copy_stays() -> None:
    """Those of others go, as somebody asks for it."""
    reader = Reader()
    residency = Residency(make_pool(rows=16), reader, host_bytes=2 * COPY_8, executor=InlineExecutor(), forget_turns=3)
    visited(residency, "a")
    for digest in "bc":
        acquired(residency, digest)
    residency.request("d", "8")  # read, and forgotten as there is no room: its copy takes the place of another's
    for _ in range(8):
        assert residency.acquire("a", "8") is None
        residency.advance()
    residency.check_integrity()
    assert residency.host_evictions == 2
    residency.release("b")
    for _ in range(4):
        residency.request("a", "8")
        residency.advance()
    assert residency.on_device("a")
    assert reader.read == ["a", "b", "c", "d"]


def test_what_was_read_and_found_no_room_leaves_a_copy() -> None:
    reader = Reader()
    residency = Residency(make_pool(rows=8), reader, host_bytes=2 * COPY_8, executor=InlineExecutor(), forget_turns=3)
    acquired(residency, "held")
    residency.request("b", "8")
    outcomes = [outcome for _ in range(8) for outcome in residency.advance()]
    assert [type(outcome.error) for outcome in outcomes] == [ResourceExhausted]
    residency.release("held")
    visited(residency, "b")
    assert reader.read == ["held", "b"]


def test_slots_are_never_used_twice() -> None:
    pool = make_pool(rows=8)
    first = pool.load(lowered(8, 1.0))
    assert first is not None
    assert pool.load(lowered(8)) is None
    pool.evict(first)
    second = pool.load(lowered(8, 2.0))
    assert second is not None
    assert second != first
    with pytest.raises(KeyError):
        pool.plans([SlotSegment(0, 1, first)])


def test_mixed_ranks_take_their_rows_and_no_more() -> None:
    pool = make_pool(rows=256)
    for rank in (4, 8, 17, 128):
        assert pool.load(lowered(rank)) is not None
    assert pool.rows_used == 2 * (8 + 8 + 24 + 128)


class InlineExecutor(Executor):
    """Runs what is submitted at once, so that a run of the machine can be repeated exactly; or never."""

    is_stuck = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        if self.is_stuck:
            return future
        try:
            future.set_result(fn(*args, **kwargs))
        except ChorusError as error:
            future.set_exception(error)
        return future


def test_what_nobody_asks_for_any_more_leaves_the_line() -> None:
    residency = Residency(make_pool(rows=16), load_by_name, executor=InlineExecutor(), forget_turns=5)
    residency.pin("held", "8")
    residency.advance()
    residency.request("abandoned", "16")
    residency.pin("pinned", "16")
    outcomes = []
    for _ in range(10):
        assert residency.acquire("wanted", "8") is None
        outcomes += residency.advance()
    assert {r.digest for r in residency.residents()} == {"held", "pinned", "wanted"}
    ((digest, error, _),) = outcomes
    assert digest == "abandoned"
    assert isinstance(error, ResourceExhausted)
    assert (error.reason, error.retry_after_s) == ("NO_ADAPTER_ROOM", 1.0)
    residency.unpin("pinned")
    residency.request("wanted", "8")
    outcomes = residency.advance()
    assert [(o.digest, o.error is None) for o in outcomes] == [("pinned", False)]
    residency.request("wanted", "8")
    assert [(o.digest, o.error) for o in residency.advance()] == [("wanted", None)]


def test_only_the_first_in_line_take_host_memory_and_all_get_their_turn() -> None:
    read: list[str] = []

    def load(digest: str, path: str) -> LoadedHost:
        read.append(digest)
        return load_by_name(digest, path)

    residency = Residency(make_pool(rows=8), load, executor=InlineExecutor())
    residency.pin("held", "8")
    residency.advance()
    newcomers = [f"v{i}" for i in range(AHEAD + 3)]
    for digest in newcomers:
        residency.request(digest, "8")
    residency.advance()
    assert read == ["held", *newcomers[:AHEAD]]
    assert sum(r.host is not None for r in residency.residents()) == AHEAD
    residency.unpin("held")
    came: list[str] = []
    for _ in range(10 * len(newcomers)):
        came += [outcome.digest for outcome in residency.advance() if outcome.error is None]
        residency.check_integrity()
    assert came == newcomers


def test_a_failure_in_line_lets_the_next_be_read() -> None:
    residency = Residency(make_pool(), load_by_name, executor=InlineExecutor())
    for i in range(2 * AHEAD):
        residency.request(f"bad-{i}", "bad")
    residency.request("good", "8")
    outcomes = [outcome for _ in range(3) for outcome in residency.advance()]
    assert [outcome.error is None for outcome in outcomes] == [False] * 2 * AHEAD + [True]


def test_rows_that_are_no_neighbours_hold_an_adapters_factors() -> None:
    pool = make_pool(rows=24)
    first, _, third = (pool.load(lowered(8, fill)) for fill in (1.0, 2.0, 3.0))
    assert first is not None
    assert third is not None
    pool.evict(first)
    pool.evict(third)
    assert pool.load(lowered(12, 5.0)) is not None
    for name in SITES:
        a, b, scale = (getattr(pool.pools[name], which) for which in ("a", "b", "mid_scale"))
        assert a[:, 0].tolist() == [5.0] * 8 + [2.0] * 8 + [5.0] * 4 + [3.0] * 4
        assert b[:, 5].tolist() == a[:, 0].tolist()
        assert scale.tolist() == [0.5] * 24


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


def test_closing_does_not_wait_for_loads() -> None:
    release = threading.Event()

    def load(digest: str, path: str) -> LoadedHost:
        release.wait(60)
        return LoadedHost(lowered(8), (("host", 0.5),))

    residency = Residency(make_pool(), load)
    residency.request("a", "p")
    began = time.monotonic()
    residency.close()
    assert time.monotonic() - began < 20
    release.set()
