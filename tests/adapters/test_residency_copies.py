"""Copies in host memory: what was evicted comes back without being read."""

from chorus.adapters.residency import AHEAD, Residency
from chorus.errors import ResourceExhausted
from support.residency import (
    BYTES_8,
    COPY_8,
    InlineExecutor,
    Reader,
    acquired,
    assert_holds,
    load_by_name,
    make_pool,
    visited,
)


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
