"""Several outputs of one request over a real port: whose token is whose, and what ends what."""

import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

import pytest

from chorus.engine.messages import (
    Abort,
    Event,
    Failed,
    FinishReason,
    PromptLogprobs,
    Started,
    Submit,
    TokenLogprob,
    Tokens,
)
from chorus.v1 import generate_pb2
from services.fakes import EOS, FakeEngine, interleaved, says
from services.harness import Rig, refused
from services.test_metrics import scrape

Message = generate_pb2.GenerateResponse


def by_index(messages: list[Message]) -> dict[int, list[Message]]:
    outputs: dict[int, list[Message]] = defaultdict(list)
    for message in messages:
        outputs[message.index].append(message)
    return outputs


def text(messages: list[Message]) -> str:
    return "".join(message.text for message in messages)


async def generate(rig: Rig, **sampling: object) -> list[Message]:
    return await rig.generate(text="abc", sampling=generate_pb2.SamplingParams(**sampling))  # type: ignore[arg-type]


async def test_each_output_has_its_own_text_and_end(rig: Rig) -> None:
    texts = ["größe", "日本 🙂", "a longer answer than the others"]
    rig.engine.reply = interleaved(*texts)
    messages = await generate(rig, n=3, max_tokens=100)
    outputs = by_index(messages)
    assert [text(outputs[i]) for i in range(3)] == texts
    for output in outputs.values():
        assert output[-1].finish_reason == generate_pb2.FINISH_REASON_STOP
        assert all(message.finish_reason == generate_pb2.FINISH_REASON_UNSPECIFIED for message in output[:-1])
    assert all("�" not in message.text for message in messages)


async def test_engine_is_asked_once_for_all_outputs(rig: Rig) -> None:
    rig.engine.reply = interleaved("a", "b", "c", "d")
    await generate(rig, n=4, seed=7)
    [submit] = rig.engine.sent(Submit)
    assert isinstance(submit, Submit)
    assert (submit.n, submit.sampling.seed) == (4, 7)


async def test_usage_and_timing_come_once_and_count_all_outputs(rig: Rig) -> None:
    rig.engine.reply = interleaved("one", "three", finish=FinishReason.LENGTH)
    messages = await generate(rig, n=2)
    assert [message.HasField("usage") for message in messages] == [False] * (len(messages) - 1) + [True]
    assert [message.HasField("timing") for message in messages] == [False] * (len(messages) - 1) + [True]
    usage = messages[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (3, len("one") + len("three"))


async def test_outputs_take_turns(rig: Rig) -> None:
    rig.engine.reply = interleaved("x" * 40, "y" * 40)
    order = [message.index for message in await generate(rig, n=2, max_tokens=100)]
    assert order[0] != order[1]
    assert all(a != b for a, b in pairwise(order))


async def test_stop_string_ends_its_own_output_only(rig: Rig) -> None:
    rig.engine.reply = interleaved("one STOP two", "no such word here, to the end", then_endless=[0])
    outputs = by_index(await generate(rig, n=2, stop=["STOP"], max_tokens=100))
    assert text(outputs[0]) == "one "
    assert outputs[0][-1].finish_reason == generate_pb2.FINISH_REASON_STOP_STRING
    assert text(outputs[1]) == "no such word here, to the end"
    assert outputs[1][-1].finish_reason == generate_pb2.FINISH_REASON_STOP
    [submit] = rig.engine.sent(Submit)
    assert isinstance(submit, Submit)
    assert rig.engine.sent(Abort) == [Abort(submit.request_id, 0)]


async def test_request_whose_outputs_all_met_a_stop_string_is_over(rig: Rig) -> None:
    rig.engine.reply = interleaved("a STOP" + "x" * 200, "bcd STOP" + "x" * 200)
    messages = await generate(rig, n=2, stop=["STOP"], max_tokens=300)
    outputs = by_index(messages)
    assert [text(outputs[0]), text(outputs[1])] == ["a ", "bcd "]
    assert messages[-1].usage.completion_tokens == len("a STOP") + len("bcd STOP")


def with_logprobs(letters: str) -> list[TokenLogprob]:
    return [TokenLogprob(-float(ord(c)), ((ord(c), -float(ord(c))), (0, -200.0))) for c in letters]


async def test_each_token_has_its_logprob_and_what_a_stop_string_cuts_has_none(rig: Rig) -> None:
    def reply(submit: Submit, engine: FakeEngine) -> Iterator[Event | float]:
        yield Started(submit.request_id, time.monotonic(), 0.0)
        answer = "ab STOP cd"
        yield Tokens(submit.request_id, (*answer.encode(),), logprobs=(*with_logprobs(answer),))

    rig.engine.reply = reply
    messages = await generate(rig, stop=["STOP"], logprobs=2)
    pairs = [
        (token, entry) for message in messages for token, entry in zip(message.token_ids, message.logprobs, strict=True)
    ]
    assert [token for token, _ in pairs] == [*b"ab STOP"]
    assert [entry.logprob for _, entry in pairs] == [-float(token) for token, _ in pairs]
    assert [dict(entry.top) for _, entry in pairs] == [{token: -float(token), 0: -200.0} for token, _ in pairs]


async def test_logprobs_of_one_output_are_not_anothers(rig: Rig) -> None:
    def reply(submit: Submit, engine: FakeEngine) -> Iterator[Event | float]:
        yield Started(submit.request_id, time.monotonic(), 0.0)
        for index, letters in enumerate(("abc", "xyz")):
            finish, entries = FinishReason.LENGTH, (*with_logprobs(letters),)
            yield Tokens(submit.request_id, (*letters.encode(),), finish, index, entries)

    rig.engine.reply = reply
    for index, output in by_index(await generate(rig, n=2, logprobs=2)).items():
        found = [entry.logprob for message in output for entry in message.logprobs]
        assert found == [-float(byte) for byte in (b"abc", b"xyz")[index]]


async def test_without_being_asked_no_message_has_logprobs(rig: Rig) -> None:
    rig.engine.reply = says("abc")
    messages = await generate(rig)
    assert not any(message.logprobs or message.prompt_logprobs for message in messages)


async def test_prompts_logprobs_are_on_the_first_message_alone(rig: Rig) -> None:
    def reply(submit: Submit, engine: FakeEngine) -> Iterator[Event | float]:
        yield Started(submit.request_id, time.monotonic(), 0.0)
        yield PromptLogprobs(submit.request_id, (*with_logprobs("bc"),))
        yield 0.02
        yield from interleaved("one", "two")(submit, engine)

    rig.engine.reply = reply
    messages = await generate(rig, n=2, prompt_logprobs=2)
    assert [entry.logprob for entry in messages[0].prompt_logprobs] == [-98.0, -99.0]
    assert not any(message.prompt_logprobs for message in messages[1:])
    assert messages[0].token_ids


async def test_end_of_sequence_of_one_output_is_a_token_of_it(rig: Rig) -> None:
    rig.engine.reply = interleaved("a", "bc")
    outputs = by_index(await generate(rig, n=2))
    assert [token for message in outputs[0] for token in message.token_ids] == [*b"a", EOS]
    assert [token for message in outputs[1] for token in message.token_ids] == [*b"bc", EOS]


async def test_more_outputs_than_the_server_queues_are_refused(rig: Rig) -> None:
    seen = await refused(generate(rig, n=129))
    assert (seen.code, seen.fields) == ("INVALID_ARGUMENT", {"sampling.n": "must be between 1 and 128"})


async def test_outputs_are_counted_one_by_one_and_their_request_once(rig: Rig) -> None:
    rig.engine.reply = interleaved("one STOP two", "three")
    await generate(rig, n=2, stop=["STOP"], max_tokens=100)
    samples = await scrape(rig)
    assert samples["chorus_requests_finished_total", (("reason", "stop_string"),)] == 1
    assert samples["chorus_requests_finished_total", (("reason", "stop"),)] == 1
    assert samples["chorus_time_to_first_token_seconds_count", ()] == 1
    assert samples["chorus_e2e_request_latency_seconds_count", ()] == 1
    assert samples["chorus_prompt_tokens_total", ()] == 3
    tokens = samples["chorus_generation_tokens_total", ()]
    assert samples["chorus_inter_token_latency_seconds_count", ()] == tokens - 2


@pytest.mark.parametrize("n", [1, 3])
async def test_outputs_that_an_error_ended_are_counted_as_errors(rig: Rig, n: int) -> None:
    rig.engine.reply = lambda submit, engine: [Failed(submit.request_id, "INTERNAL", "INTERNAL", "the step failed")]
    await refused(generate(rig, n=n))
    assert (await scrape(rig))["chorus_requests_finished_total", (("reason", "error"),)] == n
