"""The front end alone: merging, slow readers, answers to whoever waits, the engine's death."""

import asyncio
import time
from collections.abc import Callable

import pytest

from chorus.engine.messages import (
    Abort,
    AdapterRef,
    Command,
    Event,
    Failed,
    FinishReason,
    Loaded,
    LoadFailed,
    Pin,
    QueryResidency,
    ResidencyReport,
    Sampling,
    Started,
    StepEvents,
    Submit,
    Tokens,
)
from chorus.errors import Aborted, DataLoss, FailedPrecondition, ResourceExhausted, Unavailable
from chorus.metrics import Metrics
from chorus.services.front_end import EngineFrontEnd
from chorus.services.streams import TokenStream

SAMPLING = Sampling(max_tokens=10)
ADAPTER = AdapterRef("d" * 64, "/nowhere")


class Port:
    """Keeps what was sent."""

    def __init__(self) -> None:
        self.sent: list[Command] = []

    def send(self, command: Command, /) -> None:
        self.sent.append(command)


@pytest.fixture
def port() -> Port:
    return Port()


@pytest.fixture
async def front_end(port: Port) -> EngineFrontEnd:
    return EngineFrontEnd(port, asyncio.get_running_loop(), Metrics(), stream_queue_tokens=16)


def tell(front_end: EngineFrontEnd, *events: Event) -> None:
    front_end.deliver(StepEvents(events))


def submit(front_end: EngineFrontEnd) -> TokenStream:
    return front_end.submit((1, 2), SAMPLING)


async def test_reader_takes_all_that_is_ready_in_one_batch(front_end: EngineFrontEnd) -> None:
    stream = submit(front_end)
    tell(front_end, Tokens(1, (5,)), Tokens(1, (6, 7)))
    tell(front_end, Tokens(1, (8,), FinishReason.LENGTH))
    batches = [batch async for batch in stream]
    assert [batch.token_ids for batch in batches] == [(5, 6, 7, 8)]
    assert batches[0].finish is FinishReason.LENGTH


async def test_reader_that_waits_gets_the_first_token_at_once(front_end: EngineFrontEnd) -> None:
    stream = submit(front_end)
    reading = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    tell(front_end, Tokens(1, (5,)))
    assert (await asyncio.wait_for(reading, 1)).token_ids == (5,)
    stream.close()


async def test_slow_reader_loses_its_own_stream_only(front_end: EngineFrontEnd, port: Port) -> None:
    slow, quick = submit(front_end), submit(front_end)
    for i in range(17):
        tell(front_end, Tokens(1, (i,)), Tokens(2, (i,)))
        assert (await anext(quick)).token_ids == (i,)
    with pytest.raises(ResourceExhausted) as error:
        await anext(slow)
    assert error.value.reason == "SLOW_READER"
    assert error.value.retry_after_s is not None
    assert [c.request_id for c in port.sent if isinstance(c, Abort)] == [1]
    tell(front_end, Tokens(1, (99,)), Tokens(2, (99,), FinishReason.STOP))
    assert (await anext(quick)).finish is FinishReason.STOP


async def test_last_batch_is_delivered_even_over_a_full_queue(front_end: EngineFrontEnd) -> None:
    stream = submit(front_end)
    tell(front_end, *(Tokens(1, (i,)) for i in range(16)), Tokens(1, (16,), FinishReason.STOP))
    assert len((await anext(stream)).token_ids) == 17


async def test_closed_stream_is_aborted_once_and_hears_nothing_more(front_end: EngineFrontEnd, port: Port) -> None:
    stream = submit(front_end)
    stream.close()
    stream.close()
    tell(front_end, Tokens(1, (5,)), Started(1, time.monotonic(), 0.0))
    assert port.sent == [Submit(1, (1, 2), SAMPLING), Abort(1)]
    assert front_end.streams_open == 0
    assert [batch async for batch in stream] == []


async def test_finished_stream_is_not_aborted(front_end: EngineFrontEnd, port: Port) -> None:
    stream = submit(front_end)
    tell(front_end, Tokens(1, (5,), FinishReason.STOP))
    stream.close()
    assert not [c for c in port.sent if isinstance(c, Abort)]


async def test_engines_error_reaches_the_reader_as_itself(front_end: EngineFrontEnd) -> None:
    stream = submit(front_end)
    tell(front_end, Tokens(1, (5,)), Failed(1, "DATA_LOSS", "DIGEST_MISMATCH", "bytes changed"))
    with pytest.raises(DataLoss, match="bytes changed"):
        await anext(stream)


async def test_everybody_who_loads_one_version_is_answered_by_one_load(front_end: EngineFrontEnd) -> None:
    waiting = [asyncio.ensure_future(front_end.load(ADAPTER)) for _ in range(3)]
    await asyncio.sleep(0)
    tell(front_end, Loaded(ADAPTER.digest))
    assert await asyncio.gather(*waiting) == [Loaded(ADAPTER.digest)] * 3


async def test_failed_pin_raises_what_the_engine_says(front_end: EngineFrontEnd, port: Port) -> None:
    waiting = asyncio.ensure_future(front_end.pin(ADAPTER))
    await asyncio.sleep(0)
    assert port.sent == [Pin(ADAPTER)]
    tell(front_end, LoadFailed(ADAPTER.digest, "FAILED_PRECONDITION", "RANK_OVER_LIMIT", "rank 512"))
    with pytest.raises(FailedPrecondition, match="rank 512"):
        await waiting


async def test_load_of_a_version_that_is_deleted_meanwhile_does_not_hang(front_end: EngineFrontEnd) -> None:
    waiting = asyncio.ensure_future(front_end.load(ADAPTER))
    await asyncio.sleep(0)
    front_end.unload(ADAPTER.digest)
    with pytest.raises(Aborted):
        await asyncio.wait_for(waiting, 1)


async def test_reports_find_their_query(front_end: EngineFrontEnd, port: Port) -> None:
    first, second = asyncio.ensure_future(front_end.residency()), asyncio.ensure_future(front_end.residency())
    await asyncio.sleep(0)
    ids = [c.query_id for c in port.sent if isinstance(c, QueryResidency)]
    reports = [ResidencyReport(i, (), i, 0, 0, 0, 0, 0) for i in ids]
    tell(front_end, *reversed(reports))
    assert [await first, await second] == reports


@pytest.mark.parametrize("ask", [EngineFrontEnd.residency, lambda f: f.load(ADAPTER), lambda f: f.pin(ADAPTER)])
async def test_death_of_the_engine_answers_everybody(
    front_end: EngineFrontEnd, ask: Callable[[EngineFrontEnd], asyncio.Future[object]]
) -> None:
    stream = submit(front_end)
    waiting = asyncio.ensure_future(ask(front_end))
    await asyncio.sleep(0)
    front_end.fail_all(Unavailable("gone", reason="ENGINE_DEAD"))
    with pytest.raises(Unavailable, match="gone"):
        await anext(stream)
    with pytest.raises(Unavailable, match="gone"):
        await waiting
    with pytest.raises(Unavailable, match="gone"):
        submit(front_end)
    with pytest.raises(Unavailable, match="gone"):
        await ask(front_end)
    stream.close()
