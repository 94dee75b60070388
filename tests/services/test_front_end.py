"""The front end alone: merging, slow readers, answers to whoever waits, the engine's death."""

import asyncio
import time
from collections.abc import Callable

import pytest

from chorus.engine.messages import (
    Abort,
    AdapterRef,
    Command,
    Early,
    Event,
    Failed,
    FinishReason,
    Loaded,
    LoadFailed,
    Pin,
    PromptLogprobs,
    QueryResidency,
    ResidencyReport,
    Sampling,
    Started,
    StepEvents,
    Submit,
    TokenLogprob,
    Tokens,
)
from chorus.errors import (
    Aborted,
    ChorusError,
    DataLoss,
    FailedPrecondition,
    InternalError,
    ResourceExhausted,
    Unavailable,
)
from chorus.metrics import Metrics
from chorus.services.front_end import EngineFrontEnd
from chorus.services.streams import OutputTokens, Ready, TokenStream

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
    front_end.deliver([StepEvents(events)])


def submit(front_end: EngineFrontEnd, n: int = 1) -> TokenStream:
    return front_end.submit((1, 2), SAMPLING, n=n)


def only(ready: Ready) -> OutputTokens:
    """What the one output that had something had."""
    [output] = ready.outputs
    return output


async def test_reader_takes_all_that_is_ready_in_one_batch(front_end: EngineFrontEnd) -> None:
    stream = submit(front_end)
    tell(front_end, Tokens(1, (5,)), Tokens(1, (6, 7)))
    tell(front_end, Tokens(1, (8,), FinishReason.LENGTH))
    reads = [ready async for ready in stream]
    assert [ready.outputs for ready in reads] == [(OutputTokens(0, (5, 6, 7, 8), (), FinishReason.LENGTH),)]


async def test_reader_that_waits_gets_the_first_token_at_once(front_end: EngineFrontEnd) -> None:
    stream = submit(front_end)
    reading = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    tell(front_end, Tokens(1, (5,)))
    assert only(await asyncio.wait_for(reading, 1)).token_ids == (5,)
    stream.close()


async def test_what_is_told_before_the_rest_of_its_turn_is_heard_at_once_and_counts_no_turn(port: Port) -> None:
    metrics = Metrics()
    front_end = EngineFrontEnd(port, asyncio.get_running_loop(), metrics, stream_queue_tokens=16)
    ends, goes_on = submit(front_end), submit(front_end)
    front_end.deliver([Early((Tokens(1, (5,), FinishReason.LENGTH),), 0.0)])
    assert [only(ready).token_ids async for ready in ends] == [(5,)]
    assert metrics.registry.get_sample_value("chorus_engine_steps_total") == 0
    front_end.deliver([StepEvents((Tokens(2, (6,)),), ran=True)])
    assert only(await anext(goes_on)).token_ids == (6,)
    assert metrics.registry.get_sample_value("chorus_engine_steps_total") == 1
    goes_on.close()


async def test_slow_reader_loses_its_own_stream_only(front_end: EngineFrontEnd, port: Port) -> None:
    slow, quick = submit(front_end), submit(front_end)
    for i in range(17):
        tell(front_end, Tokens(1, (i,)), Tokens(2, (i,)))
        assert only(await anext(quick)).token_ids == (i,)
    with pytest.raises(ResourceExhausted) as error:
        await anext(slow)
    assert error.value.reason == "SLOW_READER"
    assert error.value.retry_after_s is not None
    assert [c.request_id for c in port.sent if isinstance(c, Abort)] == [1]
    tell(front_end, Tokens(1, (99,)), Tokens(2, (99,), FinishReason.STOP))
    assert only(await anext(quick)).finish is FinishReason.STOP


async def test_last_batch_is_delivered_even_over_a_full_queue(front_end: EngineFrontEnd) -> None:
    stream = submit(front_end)
    tell(front_end, *(Tokens(1, (i,)) for i in range(16)), Tokens(1, (16,), FinishReason.STOP))
    assert len(only(await anext(stream)).token_ids) == 17


async def test_closed_stream_is_aborted_once_and_hears_nothing_more(front_end: EngineFrontEnd, port: Port) -> None:
    stream = submit(front_end)
    stream.close()
    stream.close()
    tell(front_end, Tokens(1, (5,)), Started(1, time.monotonic(), 0.0))
    assert port.sent == [Submit(1, (1, 2), SAMPLING), Abort(1)]
    assert front_end.streams_open == 0
    assert [ready async for ready in stream] == []


async def test_finished_stream_is_not_aborted(front_end: EngineFrontEnd, port: Port) -> None:
    stream = submit(front_end)
    tell(front_end, Tokens(1, (5,), FinishReason.STOP))
    stream.close()
    assert not [c for c in port.sent if isinstance(c, Abort)]


async def test_outputs_keep_their_own_tokens_logprobs_and_ends(front_end: EngineFrontEnd) -> None:
    stream = submit(front_end, n=3)
    a, b = TokenLogprob(-0.5), TokenLogprob(-1.5, ((7, -0.1),))
    tell(front_end, Tokens(1, (5,), index=2, logprobs=(a,)), Tokens(1, (6,), FinishReason.STOP, index=0))
    tell(front_end, Tokens(1, (7,), index=2, logprobs=(b,)))
    assert (await anext(stream)).outputs == (
        OutputTokens(2, (5, 7), (a, b)),
        OutputTokens(0, (6,), (), FinishReason.STOP),
    )
    tell(front_end, Tokens(1, (8,), FinishReason.LENGTH, index=1), Tokens(1, (9,), FinishReason.LENGTH, index=2))
    assert [output.index for output in (await anext(stream)).outputs] == [1, 2]
    assert [ready async for ready in stream] == []
    assert front_end.streams_open == 0


async def test_queue_bounds_the_tokens_of_all_outputs_together(front_end: EngineFrontEnd) -> None:
    stream = submit(front_end, n=4)
    for index in range(4):
        tell(front_end, Tokens(1, (1,) * 4, index=index))
    tell(front_end, Tokens(1, (1,), index=0))
    with pytest.raises(ResourceExhausted, match="more than 16 tokens"):
        await anext(stream)


async def test_ended_output_is_taken_back_alone_and_the_last_one_ends_the_request(
    front_end: EngineFrontEnd, port: Port
) -> None:
    stream = submit(front_end, n=2)
    tell(front_end, Tokens(1, (5,), index=0), Tokens(1, (6,), index=1))
    await anext(stream)
    stream.end_output(1, FinishReason.STOP_STRING)
    tell(front_end, Tokens(1, (7,), index=1), Tokens(1, (8,), index=0))
    assert only(await anext(stream)).token_ids == (8,)
    stream.end_output(0, FinishReason.STOP_STRING)
    stream.close()
    assert port.sent[1:] == [Abort(1, 1), Abort(1, 0)]
    assert front_end.streams_open == 0


async def test_output_that_the_engine_has_ended_is_not_aborted(front_end: EngineFrontEnd, port: Port) -> None:
    stream = submit(front_end, n=2)
    tell(front_end, Tokens(1, (5,), FinishReason.LENGTH, index=0))
    await anext(stream)
    stream.end_output(0, FinishReason.STOP_STRING)
    assert not [c for c in port.sent if isinstance(c, Abort)]
    stream.close()
    assert [c for c in port.sent if isinstance(c, Abort)] == [Abort(1)]


async def test_prompts_logprobs_come_with_the_first_tokens(front_end: EngineFrontEnd) -> None:
    stream = submit(front_end)
    reading = asyncio.ensure_future(anext(stream))
    tell(front_end, PromptLogprobs(1, (TokenLogprob(-2.0),)))
    await asyncio.sleep(0)
    assert not reading.done()
    tell(front_end, Tokens(1, (5,)))
    assert (await reading).prompt_logprobs == (TokenLogprob(-2.0),)
    tell(front_end, Tokens(1, (6,)))
    assert (await anext(stream)).prompt_logprobs == ()
    stream.close()


async def test_error_is_told_at_once_to_a_reader_that_is_busy_elsewhere(front_end: EngineFrontEnd) -> None:
    busy, waiting = submit(front_end), submit(front_end)
    heard: list[ChorusError] = []
    busy.on_unheard = waiting.on_unheard = heard.append
    reading = asyncio.ensure_future(anext(waiting))
    await asyncio.sleep(0)
    tell(front_end, *(Failed(i, "INTERNAL", "INTERNAL", f"request {i}") for i in (1, 2)))
    assert [error.message for error in heard] == ["request 1"]
    with pytest.raises(InternalError, match="request 2"):
        await reading


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
