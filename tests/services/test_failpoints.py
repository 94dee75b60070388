"""Failpoints: inert unless armed, and armed only by the environment."""

import asyncio
import time

import pytest

from chorus import failpoints


def test_nothing_happens_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(failpoints.VARIABLE, raising=False)
    failpoints.hit("a")
    assert failpoints.active() == ()


async def test_armed_points_do_what_they_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, "a=error; b=cancel; c=sleep:0.05")
    with pytest.raises(RuntimeError, match="failpoint a"):
        failpoints.hit("a")
    with pytest.raises(asyncio.CancelledError):
        await failpoints.hit_async("b")
    began = time.monotonic()
    failpoints.hit("c")
    await failpoints.hit_async("c")
    assert time.monotonic() - began >= 0.1
    failpoints.hit("d")
    assert failpoints.active() == ("a", "b", "c")


def test_a_marked_point_acts_on_work_that_holds_the_token_and_on_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, "a=sleep:0.05; a=error@7; a=memory@8; a=device@9")
    for token, error in ((7, RuntimeError), (8, MemoryError), (9, RuntimeError)):
        with pytest.raises(error, match="failpoint a"):
            failpoints.hit("a", [5, token])
    began = time.monotonic()
    failpoints.hit("a", [5, 6])
    failpoints.hit("a")
    assert time.monotonic() - began >= 0.1  # what is not marked acts on everything
    assert failpoints.active() == ("a",)


@pytest.mark.parametrize(
    "spec", ["a", "a=explode", "=error", "a=sleep", "a=error:3", "a=sleep:soon", "a=error@", "a=error@x", "a@7"]
)
def test_what_can_not_be_read_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        failpoints.parse(spec)
