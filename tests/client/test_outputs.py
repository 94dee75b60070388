"""Several outputs of one request, and log-probabilities."""

import json

import pytest

from chorus.client import Client, TokenLogprob
from chorus.errors import InternalError
from chorus.v1 import generate_pb2
from client.fake_chorus import FakeChorus

STOP = generate_pb2.FINISH_REASON_STOP
LENGTH = generate_pb2.FINISH_REASON_LENGTH
Response = generate_pb2.GenerateResponse


def test_messages_of_two_outputs_are_put_together_apart(fake: FakeChorus, client: Client) -> None:
    fake.answer(
        "Inference.Generate",
        Response(index=1, token_ids=[7], text="b"),
        Response(index=0, token_ids=[5], text="a", finish_reason=STOP),
        Response(
            index=1,
            token_ids=[8],
            text="c",
            finish_reason=LENGTH,
            usage=generate_pb2.Usage(completion_tokens=3),
            adapter_version="v",
        ),
    )
    with client.stream("hi", n=2) as answer:
        assert [(delta.index, delta.text) for delta in answer] == [(1, "b"), (0, "a"), (1, "c")]
    outputs = answer.result.outputs
    assert [(one.token_ids, one.text, one.finish_reason) for one in outputs] == [
        ((5,), "a", "stop"),
        ((7, 8), "bc", "length"),
    ]
    assert (answer.result.text, answer.result.usage.completion_tokens, answer.result.version) == ("a", 3, "v")


def test_one_output_of_two_is_not_the_whole_answer(fake: FakeChorus, client: Client) -> None:
    fake.answer("Inference.Generate", Response(index=0, text="a", finish_reason=STOP))
    with pytest.raises(InternalError) as caught:
        client.generate("hi", n=2)
    assert caught.value.reason == "INCOMPLETE_STREAM"


def test_an_output_that_was_not_asked_for_is_an_error(fake: FakeChorus, client: Client) -> None:
    fake.answer("Inference.Generate", Response(index=1, text="a", finish_reason=STOP))
    with pytest.raises(InternalError) as caught:
        client.generate("hi")
    assert caught.value.reason == "BAD_INDEX"


def test_logprobs_come_with_their_tokens_likeliest_first(fake: FakeChorus, client: Client) -> None:
    likely = generate_pb2.TokenLogprobs(logprob=-2.0, top={3: -1.0, 9: -0.5})
    fake.answer(
        "Inference.Generate",
        Response(token_ids=[5], text="a", logprobs=[likely], prompt_logprobs=[likely]),
        Response(token_ids=[6], logprobs=[generate_pb2.TokenLogprobs(logprob=-3.0)], finish_reason=STOP),
    )
    result = client.generate("hi", logprobs=2, prompt_logprobs=2)
    assert result.logprobs == (TokenLogprob(-2.0, {9: -0.5, 3: -1.0}), TokenLogprob(-3.0, {}))
    assert list(result.logprobs[0].top) == [9, 3]
    assert result.prompt_logprobs == (TokenLogprob(-2.0, {9: -0.5, 3: -1.0}),)


def test_json_is_flat_for_one_output_and_a_list_for_several(fake: FakeChorus, client: Client) -> None:
    ends = [Response(index=index, text=text, finish_reason=STOP) for index, text in enumerate("ab")]
    fake.answer("Inference.Generate", ends[0])
    one = json.loads(json.dumps(client.generate("hi").to_json()))
    assert (one["text"], one["finish_reason"]) == ("a", "stop")
    assert not {"outputs", "logprobs", "prompt_logprobs"} & one.keys()
    fake.answer("Inference.Generate", *ends)
    two = client.generate("hi", n=2).to_json()
    assert [output["text"] for output in two["outputs"]] == ["a", "b"]
    assert "text" not in two
