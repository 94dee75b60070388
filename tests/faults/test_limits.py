"""Faults 5 and 7: messages, counts and numbers over the limits; refused before they cost anything."""

import re
from typing import Any

import grpc
import psutil
import pytest
from google.protobuf.descriptor import MethodDescriptor

from chorus.admin.v1 import adapters_pb2, adapters_pb2_grpc
from chorus.v1 import generate_pb2, inference_pb2, inference_pb2_grpc
from support.claims import assert_solo_greedy, refused, until
from support.server import ServerProcess
from support.tiny import VOCAB
from support.worlds import PROMPT, TinyWorld, listing

NAN, INFINITE, HUGE = float("nan"), float("inf"), 2**31 - 1
CONTEXT = 256
GROWTH_MB = 32
LIMIT = 2**20  # of the server
TOO_LARGE = bytes(LIMIT + 2**16)
METHODS = [
    method
    for service in (
        inference_pb2.DESCRIPTOR.services_by_name["Inference"],
        adapters_pb2.DESCRIPTOR.services_by_name["Adapters"],
    )
    for method in service.methods
]
WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "n": ("sampling.n", {"n": HUGE}),
    "n negative": ("sampling.n", {"n": -1}),
    "n zero": ("sampling.n", {"n": 0}),
    "logprobs": ("sampling.logprobs", {"logprobs": HUGE}),
    "logprobs negative": ("sampling.logprobs", {"logprobs": -1}),
    "prompt logprobs": ("sampling.prompt_logprobs", {"prompt_logprobs": HUGE}),
    "max tokens": ("sampling.max_tokens", {"max_tokens": HUGE}),
    "max tokens zero": ("sampling.max_tokens", {"max_tokens": 0}),
    "max tokens by one": ("sampling.max_tokens", {"max_tokens": CONTEXT + 1}),
    "min tokens": ("sampling.min_tokens", {"min_tokens": HUGE}),
    "many stop strings": ("sampling.stop", {"stop": ["a"] * 10_000}),
    "a long stop string": ("sampling.stop[0]", {"stop": ["a" * 500_000]}),
    "an empty stop string": ("sampling.stop[1]", {"stop": ["a", ""]}),
    "many stop tokens": ("sampling.stop_token_ids", {"stop_token_ids": [1] * 10_000}),
    "a stop token out of the vocabulary": ("sampling.stop_token_ids", {"stop_token_ids": [VOCAB]}),
    "temperature NaN": ("sampling.temperature", {"temperature": NAN}),
    "temperature infinite": ("sampling.temperature", {"temperature": INFINITE}),
    "temperature negative": ("sampling.temperature", {"temperature": -0.1}),
    "top_p NaN": ("sampling.top_p", {"top_p": NAN}),
    "top_p zero": ("sampling.top_p", {"top_p": 0.0}),
    "top_k": ("sampling.top_k", {"top_k": -2}),
    "min_p NaN": ("sampling.min_p", {"min_p": NAN}),
    "presence NaN": ("sampling.presence_penalty", {"presence_penalty": NAN}),
    "frequency infinite": ("sampling.frequency_penalty", {"frequency_penalty": -INFINITE}),
    "repetition zero": ("sampling.repetition_penalty", {"repetition_penalty": 0.0}),
    "repetition NaN": ("sampling.repetition_penalty", {"repetition_penalty": NAN}),
    "bias out of the vocabulary": ("sampling.logit_bias", {"logit_bias": {VOCAB: 1.0}}),
    "bias of the largest id": ("sampling.logit_bias", {"logit_bias": {2**32 - 1: 1.0}}),
    "bias NaN": ("sampling.logit_bias", {"logit_bias": {3: NAN}}),
    "many biases": ("sampling.logit_bias", {"logit_bias": dict.fromkeys(range(20_000), 1.0)}),
}


def send(channel: Any, method: MethodDescriptor, data: bytes) -> None:
    path = f"/{method.containing_service.full_name}/{method.name}"
    if method.client_streaming:
        channel.stream_unary(path)(iter([data]), timeout=20)
    elif method.server_streaming:
        list(channel.unary_stream(path)(data, timeout=20))
    else:
        channel.unary_unary(path)(data, timeout=20)


def rss_mb(server: ServerProcess) -> float:
    """Front end and engine together."""
    front_end = psutil.Process(server.process.pid)
    return sum(float(process.memory_info().rss) for process in (front_end, *front_end.children())) / 2**20


def assert_answers(server: ServerProcess, world: TinyWorld) -> None:
    with server.client() as client:
        answer = client.generate(PROMPT, max_tokens=8, temperature=0, ignore_eos=True)
    assert_solo_greedy(world.base, None, PROMPT, answer.token_ids)


def test_message_over_the_limit_is_resource_exhausted_on_every_method(narrow: ServerProcess, world: TinyWorld) -> None:
    assert_answers(narrow, world)
    before = rss_mb(narrow)
    with narrow.channel() as public, narrow.channel(admin=True) as admin:
        for method in METHODS:
            channel = public if method.containing_service.name == "Inference" else admin
            with pytest.raises(grpc.RpcError) as caught:
                send(channel, method, TOO_LARGE)
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED, method.name
            # The transport's own words: the size and the limit.
            assert {str(len(TOO_LARGE)), str(LIMIT)} <= set(re.findall(r"\d+", caught.value.details() or ""))
    assert rss_mb(narrow) - before < GROWTH_MB
    assert_answers(narrow, world)


def test_upload_with_a_chunk_over_the_limit_leaves_nothing(narrow: ServerProcess) -> None:
    header = adapters_pb2.UploadHeader(parent="tenants/t5/adapters/large")
    header.files.add(name="adapter_model.safetensors", size_bytes=len(TOO_LARGE))
    parts = [
        adapters_pb2.CreateAdapterVersionRequest(header=header),
        adapters_pb2.CreateAdapterVersionRequest(chunk=adapters_pb2.UploadChunk(data=TOO_LARGE)),
    ]
    with narrow.channel(admin=True) as channel, pytest.raises(grpc.RpcError) as caught:
        adapters_pb2_grpc.AdaptersStub(channel).CreateAdapterVersion(iter(parts), timeout=20)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    with narrow.client() as client:
        assert client.list_adapters("t5") == ()
    # The transport has refused it; the handler hears of that behind the caller.
    until(lambda: not listing(narrow.state_dir / "blobs" / "tmp"), "nothing is left")


@pytest.mark.parametrize(("field", "sampling"), WRONG.values(), ids=WRONG)
def test_sampling_out_of_range_is_invalid_and_named(
    narrow: ServerProcess, field: str, sampling: dict[str, Any]
) -> None:
    before = narrow.scrape()
    request = generate_pb2.GenerateRequest(
        token_ids=generate_pb2.TokenIds(ids=PROMPT), sampling=generate_pb2.SamplingParams(**sampling)
    )
    with narrow.channel() as channel, refused("INVALID_ARGUMENT") as error:
        list(inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=20))
    assert field in error.fields
    assert field in error.message
    assert error.retry_after_s is None
    steps = "chorus_engine_steps_total"
    assert narrow.scrape().value(steps) == before.value(steps)


def test_memory_is_flat_under_huge_requests(narrow: ServerProcess, world: TinyWorld) -> None:
    huge = [
        generate_pb2.GenerateRequest(
            token_ids=generate_pb2.TokenIds(ids=PROMPT), sampling=generate_pb2.SamplingParams(**sampling)
        )
        for _, sampling in WRONG.values()
    ]
    with narrow.channel() as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)

        def refuse_all(times: int) -> float:
            for request in huge * times:
                with refused("INVALID_ARGUMENT"):
                    list(stub.Generate(request, timeout=20))
            return rss_mb(narrow)

        after_one = refuse_all(1)
        assert refuse_all(20) - after_one < GROWTH_MB
    assert_answers(narrow, world)
