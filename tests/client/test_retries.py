"""What gRPC's own retries do: only before the first message, only for calls that may be sent twice."""

import time

import grpc
import pytest

from chorus.client import AsyncClient, Client
from chorus.client.transport import MAX_ATTEMPTS
from chorus.errors import DeadlineExceeded, ResourceExhausted, Unavailable
from chorus.v1 import generate_pb2
from client.fake_chorus import FakeChorus, error_status

FIRST = generate_pb2.GenerateResponse(token_ids=[5], text="Hel")
LAST = generate_pb2.GenerateResponse(token_ids=[6], text="lo", finish_reason=generate_pb2.FINISH_REASON_STOP)
AWAY = error_status(grpc.StatusCode.UNAVAILABLE, "draining", "DRAINING")


def test_a_stream_that_was_refused_is_tried_again(fake: FakeChorus, client: Client) -> None:
    fake.answer("Inference.Generate", AWAY, times=2)
    fake.answer("Inference.Generate", FIRST, LAST)
    assert client.generate("hi").text == "Hello"
    assert len(fake.calls) == 3


async def test_an_asynchronous_one_too(fake: FakeChorus) -> None:
    fake.answer("Inference.Generate", AWAY)
    fake.answer("Inference.Generate", FIRST, LAST)
    async with AsyncClient(fake.address, timeout=20) as client:
        assert (await client.generate("hi")).text == "Hello"
    assert len(fake.calls) == 2


def test_a_stream_that_has_begun_is_never_tried_again(fake: FakeChorus, client: Client) -> None:
    fake.answer("Inference.Generate", FIRST, AWAY)
    with client.stream("hi") as answer, pytest.raises(Unavailable, match="draining"):
        for _ in answer:
            pass
    assert len(fake.calls) == 1


def test_tries_are_bounded(fake: FakeChorus, client: Client) -> None:
    fake.answer("Inference.Generate", AWAY, times=10)
    with pytest.raises(Unavailable):
        client.generate("hi")
    assert len(fake.calls) == MAX_ATTEMPTS


def test_a_full_server_is_not_pressed(fake: FakeChorus, client: Client) -> None:
    full = error_status(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", "QUEUE_FULL", retry_after_s=1)
    fake.answer("Inference.Generate", full, times=2)
    with pytest.raises(ResourceExhausted):
        client.generate("hi")
    assert len(fake.calls) == 1


def test_an_operators_change_is_sent_once(fake: FakeChorus, client: Client) -> None:
    fake.answer("Adapters.DeleteAdapter", AWAY, times=2)
    with pytest.raises(Unavailable):
        client.delete("acme/support")
    assert len(fake.calls) == 1


def test_the_deadline_covers_all_tries(fake: FakeChorus) -> None:
    fake.answer("Inference.Generate", lambda context: time.sleep(1.0), AWAY)
    fake.answer("Inference.Generate", fake.until_gone)
    with Client(fake.address, timeout=3) as client, pytest.raises(DeadlineExceeded):
        client.generate("hi")
    first, second = fake.calls
    assert second.time_left is not None
    assert second.time_left < 2.1, "a deadline of its own"
    assert first.time_left is not None
    assert first.time_left < 3.1
