"""Many streams share the interpreter: what comes between an output's first and last tokens may wait for a moment."""

import asyncio
import time

import pytest

from chorus.engine.messages import Command, FinishReason, Sampling, StepEvents, Tokens
from chorus.metrics import Metrics
from chorus.services.front_end import EngineFrontEnd
from chorus.services.pacing import LONGEST_S, pace
from chorus.services.streams import Ready, TokenStream

STREAMS = 64


class Silent:
    def send(self, command: Command, /) -> None:
        pass


@pytest.fixture
async def front_end() -> EngineFrontEnd:
    return EngineFrontEnd(Silent(), asyncio.get_running_loop(), Metrics(), stream_queue_tokens=1000)


def submit(front_end: EngineFrontEnd, streams: int) -> list[TokenStream]:
    return [front_end.submit((1, 2), Sampling(max_tokens=100)) for _ in range(streams)]


def tell(front_end: EngineFrontEnd, streams: list[TokenStream], token: int, finish: FinishReason | None = None) -> None:
    front_end.deliver(StepEvents(tuple(Tokens(stream.request_id, (token,), finish) for stream in streams)))


def tokens(ready: Ready) -> tuple[int, ...]:
    return ready.outputs[0].token_ids


async def soon(stream: TokenStream) -> Ready | None:
    """What can be read without waiting for a timer."""
    try:
        return await asyncio.wait_for(anext(stream), 0.001)
    except TimeoutError:
        return None


async def test_the_first_token_of_everyone_is_there_at_once(front_end: EngineFrontEnd) -> None:
    streams = submit(front_end, STREAMS)
    tell(front_end, streams, 5)
    assert [tokens(await anext(stream)) for stream in streams] == [(5,)] * STREAMS


async def test_later_tokens_of_many_come_together_and_soon(front_end: EngineFrontEnd) -> None:
    streams = submit(front_end, STREAMS)
    tell(front_end, streams, 5)
    for stream in streams:
        await anext(stream)
    began = time.monotonic()
    for token in (6, 7, 8):
        tell(front_end, streams, token)
    assert await soon(streams[0]) is None
    assert [tokens(await anext(stream)) for stream in streams] == [(6, 7, 8)] * STREAMS
    assert time.monotonic() - began < 50 * LONGEST_S


async def test_the_end_is_there_at_once_with_what_was_held(front_end: EngineFrontEnd) -> None:
    streams = submit(front_end, STREAMS)
    tell(front_end, streams, 5)
    for stream in streams:
        await anext(stream)
    tell(front_end, streams, 6)
    tell(front_end, streams, 7, FinishReason.LENGTH)
    ended = await soon(streams[0])
    assert ended is not None
    assert tokens(ended) == (6, 7)
    assert ended.outputs[0].finish is FinishReason.LENGTH


async def test_a_slow_engine_is_never_slowed_further(front_end: EngineFrontEnd) -> None:
    streams = submit(front_end, STREAMS)
    tell(front_end, streams, 5)
    for stream in streams:
        await anext(stream)
    await asyncio.sleep(pace(STREAMS))
    tell(front_end, streams, 6)
    read = await soon(streams[0])
    assert read is not None
    assert tokens(read) == (6,)


def test_the_pause_grows_with_the_streams_and_stays_short() -> None:
    assert pace(1) < 0.002
    assert pace(1) < pace(32) < pace(10_000) == LONGEST_S
