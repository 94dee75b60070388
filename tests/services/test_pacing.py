"""The step thread wakes the event loop for what cannot wait; tokens in the middle of many answers go together."""

import asyncio

import pytest

from chorus.engine.messages import Command, Event, FinishReason, Loaded, Sampling, StepEvents, StepStats, Tokens
from chorus.metrics import Metrics
from chorus.services.front_end import EngineFrontEnd
from chorus.services.pacing import LONGEST_S, pace
from chorus.services.streams import TokenStream

STREAMS = 64


class Silent:
    def send(self, command: Command, /) -> None:
        pass


class Line:
    """A front end with many running streams, and the engine's clock."""

    def __init__(self) -> None:
        self.front_end = EngineFrontEnd(
            Silent(), asyncio.get_running_loop(), Metrics(), stream_queue_tokens=1000
        )  # fmt: skip
        self.streams = [self.front_end.submit((1, 2), Sampling(max_tokens=100)) for _ in range(STREAMS)]
        self.now = 1000.0

    def post(self, *events: Event, ran: bool = True, running: int = STREAMS, after: float = 0.001) -> None:
        """One step of the engine, `after` seconds after the one before."""
        self.now += after
        self.front_end.post(StepEvents(events, StepStats(running=running), ran=ran, at=self.now))

    def everybody(self, token: int) -> list[Event]:
        return [Tokens(stream.request_id, (token,)) for stream in self.streams]


@pytest.fixture
async def line() -> Line:
    """Every stream has had its first token, just now."""
    line = Line()
    line.post(*line.everybody(5))
    for stream in line.streams:
        assert await read(stream) == (5,)
    return line


async def read(stream: TokenStream) -> tuple[int, ...] | None:
    """The tokens that can be read without waiting for another step; None where there are none."""
    try:
        ready = await asyncio.wait_for(anext(stream), 0.01)
    except TimeoutError:
        return None
    return ready.outputs[0].token_ids


async def test_tokens_in_the_middle_of_many_answers_come_together(line: Line) -> None:
    line.post(*line.everybody(6))
    line.post(*line.everybody(7))
    assert await read(line.streams[0]) is None
    line.post(*line.everybody(8), after=pace(STREAMS))
    assert [await read(stream) for stream in line.streams] == [(6, 7, 8)] * STREAMS


async def test_a_slow_engine_posts_every_step(line: Line) -> None:
    line.post(*line.everybody(6), after=pace(STREAMS))
    assert await read(line.streams[0]) == (6,)


async def test_one_answer_that_ends_takes_all_along(line: Line) -> None:
    line.post(*line.everybody(6))
    line.post(Tokens(line.streams[3].request_id, (7,), FinishReason.LENGTH))
    assert await read(line.streams[3]) == (6, 7)
    assert await read(line.streams[0]) == (6,)


async def test_a_first_token_does_not_wait(line: Line) -> None:
    late = line.front_end.submit((1, 2), Sampling(max_tokens=100))
    line.post(*line.everybody(6), Tokens(late.request_id, (9,)))
    assert await read(late) == (9,)


@pytest.mark.parametrize("ending", [{"ran": False}, {"running": 0}])
async def test_nothing_is_held_when_no_step_may_follow(line: Line, ending: dict[str, int]) -> None:
    line.post(*line.everybody(6), **ending)  # type: ignore[arg-type]
    assert await read(line.streams[0]) == (6,)


async def test_what_is_no_token_does_not_wait(line: Line) -> None:
    line.post(*line.everybody(6))
    line.post(Loaded("d" * 64))
    assert await read(line.streams[0]) == (6,)


def test_the_pause_grows_with_the_streams_and_stays_short() -> None:
    assert pace(1) < 0.002
    assert pace(1) < pace(32) < pace(10_000) == LONGEST_S
