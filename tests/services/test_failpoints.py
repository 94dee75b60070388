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


@pytest.mark.parametrize("spec", ["a", "a=explode", "=error", "a=sleep", "a=error:3", "a=sleep:soon"])
def test_what_can_not_be_read_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        failpoints.parse(spec)
