"""Programs with a time limit: what loops is ended, what is in time is not, and nobody pays for somebody else."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable
from functools import partial

import pytest

from chorus.services.time_limit import TimeLimit


@pytest.fixture
async def limit() -> AsyncIterator[TimeLimit]:
    limit = TimeLimit(0.5, threads=1, name="test")
    yield limit
    limit.close()


def loop_for_ever() -> None:
    for _ in itertools.cycle((0,)):
        pass


def swallow_and_loop() -> None:
    while True:
        try:
            loop_for_ever()
        except Exception:
            continue


async def test_result_and_errors_of_a_program_in_time_are_its_own(limit: TimeLimit) -> None:
    assert await limit.run(lambda: "done") == "done"
    with pytest.raises(ZeroDivisionError):
        await limit.run(lambda: 1 // 0)


@pytest.mark.parametrize("program", [loop_for_ever, swallow_and_loop])
async def test_program_that_loops_is_ended_and_its_thread_serves_the_next(
    limit: TimeLimit, program: Callable[[], None]
) -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        await limit.run(program)
    assert time.monotonic() - began < 10
    assert await limit.run(lambda: "next") == "next"


async def test_waiting_for_a_thread_does_not_count(limit: TimeLimit) -> None:
    async def nap(i: int) -> int:
        return await limit.run(lambda: time.sleep(0.02) or i)  # type: ignore[func-returns-value]

    # The last one waits for longer than its limit.
    assert await asyncio.gather(*(nap(i) for i in range(30))) == [*range(30)]


async def test_program_that_ends_just_as_its_time_is_up_has_one_end_and_its_thread_lives() -> None:
    limit = TimeLimit(0.002, threads=1, name="test")

    def busy(seconds: float) -> str:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass
        return "done"

    async def end_of(seconds: float) -> str:
        try:
            return await asyncio.wait_for(limit.run(partial(busy, seconds)), 5)
        except TimeoutError as error:
            return str(error)

    ends = [await end_of(0.001 + i % 24 * 0.0005) for i in range(144)]
    limit.close()
    assert set(ends) == {"done", "over 0.002 s"}
