"""Residency: loads off the step thread, references, pins, least recently used first."""

import threading
import time
from typing import Any

import pytest

from chorus.adapters.residency import Residency
from chorus.adapters.resident import LoadedHost
from chorus.errors import FailedPrecondition
from support.residency import InlineExecutor, acquired, load_by_name, lowered, make_pool, settle


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
