import threading

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from chorus.client import Client, Timing, Usage
from chorus.errors import InternalError, ResourceExhausted
from chorus.v1 import generate_pb2, model_pb2
from client.fake_chorus import FakeChorus, error_status

VERSION = "tenants/acme/adapters/support/versions/" + "ab" * 32
FIRST = generate_pb2.GenerateResponse(token_ids=[5, 6], text="Hel", adapter_version=VERSION)
LAST = generate_pb2.GenerateResponse(
    token_ids=[7],
    text="lo",
    finish_reason=generate_pb2.FINISH_REASON_LENGTH,
    usage=generate_pb2.Usage(prompt_tokens=4, cached_tokens=2, completion_tokens=3),
    timing=generate_pb2.Timing(
        queue=Duration(nanos=250_000_000), first_token=Duration(nanos=500_000_000), total=Duration(seconds=1)
    ),
    adapter_version=VERSION,
)
SILENT_END = generate_pb2.GenerateResponse(token_ids=[9], finish_reason=generate_pb2.FINISH_REASON_STOP)


def test_deltas_come_in_order_and_the_result_is_all_of_them(fake: FakeChorus, client: Client) -> None:
    fake.answer("Inference.Generate", FIRST, LAST)
    with client.stream("hi", adapter="acme/support") as answer:
        deltas = list(answer)
    assert [(delta.token_ids, delta.text, delta.finish_reason) for delta in deltas] == [
        ((5, 6), "Hel", None),
        ((7,), "lo", "length"),
    ]
    result = answer.result
    assert (result.token_ids, result.text, result.finish_reason) == ((5, 6, 7), "Hello", "length")
    assert result.version == VERSION
    assert result.usage == Usage(prompt_tokens=4, cached_tokens=2, completion_tokens=3)
    assert result.timing == Timing(queue=0.25, adapter_load=0.0, first_token=0.5, total=1.0)


def test_a_delta_is_there_before_the_next_is_sent(fake: FakeChorus, client: Client) -> None:
    seen = threading.Event()
    fake.answer("Inference.Generate", FIRST, lambda context: seen.wait(10), LAST)
    with client.stream("hi") as answer:
        assert next(answer).text == "Hel"
        seen.set()
        assert next(answer).text == "lo"


def test_result_before_the_end_is_refused(fake: FakeChorus, client: Client) -> None:
    fake.answer("Inference.Generate", FIRST, LAST)
    with client.stream("hi") as answer:
        next(answer)
        with pytest.raises(RuntimeError, match="not ended"):
            _ = answer.result


def test_leaving_the_context_cancels_on_the_server(fake: FakeChorus, client: Client) -> None:
    fake.answer("Inference.Generate", FIRST, fake.until_gone)
    with client.stream("hi") as answer:
        next(answer)
    assert fake.gone.wait(5)


def test_cancel_ends_the_iteration_quietly(fake: FakeChorus, client: Client) -> None:
    fake.answer("Inference.Generate", FIRST, fake.until_gone)
    with client.stream("hi") as answer:
        texts = []
        for delta in answer:
            texts.append(delta.text)
            answer.cancel()
    assert texts == ["Hel"]


def test_an_error_after_the_first_delta_is_raised(fake: FakeChorus, client: Client) -> None:
    broken = error_status(grpc.StatusCode.RESOURCE_EXHAUSTED, "too slow a reader", "SLOW_READER")
    fake.answer("Inference.Generate", FIRST, broken)
    with client.stream("hi") as answer:
        assert next(answer).text == "Hel"
        with pytest.raises(ResourceExhausted, match="too slow a reader"):
            next(answer)


@pytest.mark.parametrize("items", [(), (FIRST,)])
def test_a_stream_without_a_finish_reason_is_an_error(fake: FakeChorus, client: Client, items: tuple[object]) -> None:
    fake.answer("Inference.Generate", *items, lambda context: None)
    with pytest.raises(InternalError) as caught:
        client.generate("hi")
    assert caught.value.reason == "INCOMPLETE_STREAM"


def test_a_finish_reason_of_a_newer_server_is_passed_on(fake: FakeChorus, client: Client) -> None:
    newer = generate_pb2.GenerateResponse.FromString(b"\x28\x63")
    fake.answer("Inference.Generate", FIRST, newer)
    assert client.generate("hi").finish_reason == "unknown_99"


def test_text_is_none_without_a_tokenizer_and_the_model_is_asked_once(fake: FakeChorus, client: Client) -> None:
    fake.answer("Inference.GetModel", model_pb2.Model(has_tokenizer=False))
    for _ in range(2):
        fake.answer("Inference.Generate", SILENT_END)
        assert client.generate([1]).text is None
    assert len(fake.calls_of("Inference.GetModel")) == 1


def test_text_is_empty_when_the_tokenizer_gave_none(fake: FakeChorus, client: Client) -> None:
    fake.answer("Inference.GetModel", model_pb2.Model(has_tokenizer=True))
    fake.answer("Inference.Generate", SILENT_END)
    assert client.generate([1]).text == ""


def test_a_text_that_was_taken_proves_a_tokenizer(fake: FakeChorus, client: Client) -> None:
    fake.answer("Inference.Generate", SILENT_END)
    assert client.generate("hi").text == ""
    assert not fake.calls_of("Inference.GetModel")


def test_a_whole_answer_is_not_lost_when_the_server_takes_no_more_calls(fake: FakeChorus, client: Client) -> None:
    fake.answer("Inference.Generate", SILENT_END)
    draining = error_status(grpc.StatusCode.UNAVAILABLE, "draining", "DRAINING")
    fake.answer("Inference.GetModel", draining, times=4)
    result = client.generate([1])
    assert (result.token_ids, result.text) == ((9,), None)


def test_the_model_is_not_asked_when_text_came(fake: FakeChorus, client: Client) -> None:
    fake.answer("Inference.Generate", FIRST, LAST)
    assert client.generate("hi").text == "Hello"
    assert not fake.calls_of("Inference.GetModel")


def test_the_base_model_has_no_version(fake: FakeChorus, client: Client) -> None:
    fake.answer("Inference.Generate", SILENT_END)
    assert client.generate("hi").version == ""
