"""What a GenerateRequest may say: the table of fields, and that nothing whatsoever gets past it unchecked."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.engine.messages import Sampling
from chorus.errors import InvalidArgument
from chorus.services.validation import Wish, check_generate, check_score, fit
from chorus.v1 import generate_pb2, tasks_pb2
from services.fakes import FACTS

INT32 = st.integers(-(2**31), 2**31 - 1)
DOUBLE = st.floats(allow_nan=True, allow_infinity=True)


def check(**sampling: Any) -> Wish:
    params = generate_pb2.SamplingParams(**sampling)
    return check_generate(generate_pb2.GenerateRequest(text="x", sampling=params), FACTS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 513),
        ("max_tokens", 2**31 - 1),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("temperature", -0.1),
        ("temperature", 10.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -2),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", math.nan),
        ("stop", ["x"] * 17),
        ("stop_token_ids", [1] * 65),
        ("stop_token_ids", [257]),
        ("stop_token_ids", [2**32 - 1]),
        ("presence_penalty", 2.1),
        ("presence_penalty", -math.inf),
        ("frequency_penalty", math.nan),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", math.inf),
        ("repetition_penalty", math.nan),
        ("n", 0),
        ("n", 129),
        ("n", 100_000),
        ("logprobs", -1),
        ("logprobs", 1000),
        ("prompt_logprobs", 21),
        ("logit_bias", {257: 1.0}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", {1: math.inf}),
        ("logit_bias", dict.fromkeys(range(1025), 1.0)),
    ],
)
def test_value_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidArgument) as error:
        check(**{field: value})
    assert [violation.field for violation in error.value.violations] == [f"sampling.{field}"]


@pytest.mark.parametrize(("stop", "field"), [([""], "sampling.stop[0]"), (["a", "b" * 257], "sampling.stop[1]")])
def test_stop_strings_are_refused_one_by_one(stop: list[str], field: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        check(stop=stop)
    assert [violation.field for violation in error.value.violations] == [field]


def test_every_field_reaches_the_engine_as_it_was_said() -> None:
    wish = check(
        max_tokens=9,
        min_tokens=3,
        temperature=0.5,
        top_k=7,
        top_p=0.9,
        min_p=0.05,
        presence_penalty=0.5,
        frequency_penalty=-2.0,
        repetition_penalty=1.25,
        seed=2**64 - 1,
        stop=["a"],
        stop_token_ids=[5],
        logit_bias={9: -100.0, 3: 2.5},
        logprobs=0,
        prompt_logprobs=20,
        n=3,
        ignore_eos=True,
    )
    assert wish.n == 3
    assert wish.sampling == Sampling(
        max_tokens=9,
        min_tokens=3,
        temperature=0.5,
        top_k=7,
        top_p=0.9,
        min_p=0.05,
        seed=2**64 - 1,
        stop_token_ids=frozenset({5}),
        ignore_eos=True,
        presence_penalty=0.5,
        frequency_penalty=-2.0,
        repetition_penalty=1.25,
        logit_bias=((3, 2.5), (9, -100.0)),
        logprobs=0,
        prompt_logprobs=20,
    )


def test_bias_of_zero_asks_for_nothing() -> None:
    assert check(logit_bias={5: 0.0}).sampling.logit_bias == ()


def test_unset_logprobs_are_none_and_differ_from_zero() -> None:
    assert (check().sampling.logprobs, check().sampling.prompt_logprobs) == (None, None)
    assert check(logprobs=0, prompt_logprobs=0).sampling.logprobs == 0


def test_n_is_limited_by_the_servers_queue_too() -> None:
    request = generate_pb2.GenerateRequest(text="x", sampling=generate_pb2.SamplingParams(n=9))
    assert check_generate(request, FACTS, max_n=9).n == 9
    with pytest.raises(InvalidArgument, match="must be between 1 and 8"):
        check_generate(request, FACTS, max_n=8)


def test_defaults_are_vllms() -> None:
    sampling = check().sampling
    assert (sampling.max_tokens, sampling.min_tokens, sampling.temperature) == (16, 0, 1.0)
    assert (sampling.top_k, sampling.top_p, sampling.min_p, sampling.ignore_eos) == (0, 1.0, 0.0, False)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.0, 0.0, 1.0)
    assert check().n == 1


def test_zero_differs_from_unset() -> None:
    assert check(temperature=0.0, seed=0).sampling.temperature == 0.0
    assert check(temperature=0.0, seed=0).sampling.seed == 0


def test_unset_seeds_differ() -> None:
    assert len({check().sampling.seed for _ in range(20)}) == 20


def test_top_k_of_minus_one_is_off() -> None:
    assert check(top_k=-1).sampling.top_k == 0


def test_all_violations_are_told_at_once() -> None:
    params = generate_pb2.SamplingParams(temperature=-1, top_p=2, max_tokens=0, n=500, logprobs=21, stop=[""])
    request = generate_pb2.GenerateRequest(sampling=params, priority=101, request_id="a\nb")
    with pytest.raises(InvalidArgument) as error:
        check_generate(request, FACTS)
    assert {violation.field for violation in error.value.violations} == {
        "prompt",
        "priority",
        "request_id",
        "sampling.temperature",
        "sampling.top_p",
        "sampling.max_tokens",
        "sampling.n",
        "sampling.logprobs",
        "sampling.stop[0]",
    }


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ({}, "prompt"),
        ({"text": ""}, "text"),
        ({"token_ids": generate_pb2.TokenIds()}, "token_ids.ids"),
        ({"token_ids": generate_pb2.TokenIds(ids=[257])}, "token_ids.ids"),
        ({"token_ids": generate_pb2.TokenIds(ids=[1] * 512)}, "prompt"),
        ({"messages": generate_pb2.Messages(messages=[generate_pb2.Message(role="god")])}, "messages.messages[0].role"),
        ({"messages": generate_pb2.Messages()}, "messages.messages"),
        (
            {"messages": generate_pb2.Messages(messages=[generate_pb2.Message(role="user")] * 1025)},
            "messages.messages",
        ),
    ],
)
def test_prompts_that_are_none_are_refused(prompt: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        check_generate(generate_pb2.GenerateRequest(**prompt), FACTS)
    assert [violation.field for violation in error.value.violations] == [field]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "prompt"),
        ({"prompt": "a"}, "continuations"),
        ({"continuations": ["a"]}, "prompt"),
        ({"prompt": "a", "continuations": ["b", ""]}, "continuations[1]"),
        ({"prompt": "a", "continuations": ["b"] * 129}, "continuations"),
        ({"prompt": "a", "continuations": ["b"], "prompt_token_ids": [1]}, "prompt_token_ids"),
        ({"prompt": "a", "continuation_token_ids": [generate_pb2.TokenIds(ids=[1])]}, "prompt_token_ids"),
        ({"prompt_token_ids": [1]}, "continuation_token_ids"),
        ({"prompt_token_ids": [1], "continuation_token_ids": [generate_pb2.TokenIds()]}, "continuation_token_ids[0]"),
        ({"prompt_token_ids": [257], "continuation_token_ids": [generate_pb2.TokenIds(ids=[1])]}, "prompt_token_ids"),
        (
            {"prompt_token_ids": [1], "continuation_token_ids": [generate_pb2.TokenIds(ids=[257])]},
            "continuation_token_ids",
        ),
        ({"prompt": "a", "continuations": ["b"], "request_id": "x" * 129}, "request_id"),
    ],
)
def test_what_can_not_be_scored_is_refused_by_name(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        check_score(tasks_pb2.ScoreRequest(**fields), FACTS)
    assert field in [violation.field for violation in error.value.violations]


def test_text_and_ids_are_each_scored() -> None:
    check_score(tasks_pb2.ScoreRequest(prompt="a", continuations=["b"] * 128), FACTS)
    ids = [generate_pb2.TokenIds(ids=[256])]
    check_score(tasks_pb2.ScoreRequest(prompt_token_ids=[0], continuation_token_ids=ids), FACTS)


def test_completion_is_limited_by_what_the_prompt_leaves() -> None:
    sampling = check(max_tokens=100, min_tokens=50).sampling
    assert fit(sampling, 500, FACTS).max_tokens == 12
    assert fit(sampling, 500, FACTS).min_tokens == 12
    with pytest.raises(InvalidArgument, match="512"):
        fit(sampling, 512, FACTS)
    with pytest.raises(InvalidArgument, match="empty"):
        fit(sampling, 0, FACTS)


REQUESTS = st.builds(
    generate_pb2.SamplingParams,
    max_tokens=st.none() | INT32,
    temperature=st.none() | DOUBLE,
    top_k=st.none() | INT32,
    top_p=st.none() | DOUBLE,
    min_p=st.none() | DOUBLE,
    presence_penalty=st.none() | DOUBLE,
    frequency_penalty=st.none() | DOUBLE,
    repetition_penalty=st.none() | DOUBLE,
    seed=st.none() | st.integers(0, 2**64 - 1),
    stop=st.lists(st.text(max_size=300), max_size=20),
    stop_token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=70),
    logit_bias=st.dictionaries(st.integers(0, 2**32 - 1), DOUBLE, max_size=5),
    n=st.none() | INT32 | st.integers(1, 128),
    logprobs=st.none() | INT32 | st.integers(0, 20),
    prompt_logprobs=st.none() | INT32,
    min_tokens=st.none() | INT32,
)


@given(REQUESTS, st.text(max_size=200), INT32)
def test_whatever_is_asked_is_refused_or_within_every_limit(
    params: generate_pb2.SamplingParams, request_id: str, priority: int
) -> None:
    request = generate_pb2.GenerateRequest(text="x", sampling=params, request_id=request_id, priority=priority)
    try:
        wish = check_generate(request, FACTS)
    except InvalidArgument:
        return
    sampling = wish.sampling
    assert 1 <= sampling.max_tokens <= FACTS.context_length
    assert 0 <= sampling.min_tokens <= sampling.max_tokens
    assert 0 <= sampling.temperature <= 10
    assert sampling.top_k >= 0
    assert 0 < sampling.top_p <= 1
    assert 0 <= sampling.min_p <= 1
    assert all(token < FACTS.vocab_size for token in sampling.stop_token_ids)
    assert all(0 < len(text) <= 256 for text in wish.stop)
    assert -2 <= sampling.presence_penalty <= 2
    assert -2 <= sampling.frequency_penalty <= 2
    assert 0 < sampling.repetition_penalty < math.inf
    assert all(token < FACTS.vocab_size and -100 <= bias <= 100 for token, bias in sampling.logit_bias)
    assert 1 <= wish.n <= 128
    assert sampling.logprobs is None or 0 <= sampling.logprobs <= 20
    assert sampling.prompt_logprobs is None or 0 <= sampling.prompt_logprobs <= 20
    assert -100 <= wish.priority <= 100
    assert len(request_id) <= 128
