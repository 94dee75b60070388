from collections.abc import Sequence
from typing import Any

import pytest

from chorus.client import AsyncClient, Client, Sampling, Score, Scores
from chorus.errors import InvalidArgument
from chorus.v1 import adapter_pb2, generate_pb2, inference_pb2, model_pb2, tasks_pb2
from client.fake_chorus import FakeChorus

DONE = generate_pb2.GenerateResponse(text="x", finish_reason=generate_pb2.FINISH_REASON_STOP)


def ask(fake: FakeChorus, client: Client, prompt: Any, **kwargs: Any) -> generate_pb2.GenerateRequest:
    fake.answer("Inference.Generate", DONE)
    client.generate(prompt, **kwargs)
    request: generate_pb2.GenerateRequest = fake.calls[-1].request
    return request


def test_a_text_goes_as_text(fake: FakeChorus, client: Client) -> None:
    request = ask(fake, client, "héllo", adapter="acme/support@canary")
    assert request.text == "héllo"
    assert request.adapter == "tenants/acme/adapters/support@canary"


@pytest.mark.parametrize("prompt", [[3, 1, 2], (3, 1, 2)])
def test_token_ids_go_as_they_are(fake: FakeChorus, client: Client, prompt: Sequence[int]) -> None:
    assert list(ask(fake, client, prompt).token_ids.ids) == [3, 1, 2]


@pytest.mark.parametrize(("prompt", "kind"), [("", "text"), ([], "token_ids")])
def test_an_empty_prompt_still_says_which_kind(
    fake: FakeChorus, client: Client, prompt: str | list[int], kind: str
) -> None:
    assert ask(fake, client, prompt).WhichOneof("prompt") == kind


def test_every_sampling_parameter_arrives(fake: FakeChorus, client: Client) -> None:
    given: dict[str, Any] = {
        "max_tokens": 5,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
        "min_p": 0.1,
        "seed": 2**64 - 1,
        "stop": ["a", "b"],
        "stop_token_ids": [8, 9],
        "ignore_eos": True,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.25,
        "logit_bias": {7: -5.0, 0: 1.5},
        "logprobs": 0,
        "prompt_logprobs": 3,
        "n": 1,
    }
    assert given.keys() == Sampling.__annotations__.keys()
    sampling = ask(fake, client, "hi", **given).sampling
    assert {name: getattr(sampling, name) for name in given} == given


def test_every_sampling_parameter_of_the_contract_can_be_given() -> None:
    assert set(generate_pb2.SamplingParams.DESCRIPTOR.fields_by_name) == Sampling.__annotations__.keys()


def test_messages_go_as_messages(fake: FakeChorus, client: Client) -> None:
    said = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    request = ask(fake, client, said)
    assert [(message.role, message.content) for message in request.messages.messages] == [
        ("system", "be brief"),
        ("user", "hi"),
    ]


def test_priority_and_request_id_arrive(fake: FakeChorus, client: Client) -> None:
    request = ask(fake, client, "hi", priority=-3, request_id="job-7")
    assert (request.priority, request.request_id) == (-3, "job-7")


def test_texts_are_scored(fake: FakeChorus, client: Client) -> None:
    first = tasks_pb2.ContinuationScore(logprob=-1.5, token_logprobs=[-1.0, -0.5], token_ids=[3, 4])
    fake.answer("Inference.Score", tasks_pb2.ScoreResponse(scores=[first], adapter_version="v"))
    found = client.score("the", [" end"], adapter="acme/support", request_id="job-7")
    assert found == Scores((Score(-1.5, (-1.0, -0.5), (3, 4)),), "v")
    request = fake.calls[0].request
    assert (request.prompt, list(request.continuations), request.request_id) == ("the", [" end"], "job-7")
    assert request.adapter == "tenants/acme/adapters/support"


def test_token_ids_are_scored(fake: FakeChorus, client: Client) -> None:
    fake.answer("Inference.Score", tasks_pb2.ScoreResponse())
    client.score([1, 2], [[3], [4, 5]])
    request = fake.calls[0].request
    assert list(request.prompt_token_ids) == [1, 2]
    assert [list(ids.ids) for ids in request.continuation_token_ids] == [[3], [4, 5]]


def test_one_text_is_not_a_list_of_continuations(client: Client) -> None:
    with pytest.raises(InvalidArgument, match="continuations"):
        client.score("the", " end")


def test_texts_become_token_ids_and_back(fake: FakeChorus, client: Client) -> None:
    fake.answer("Inference.Tokenize", tasks_pb2.TokenizeResponse(token_ids=[4, 2]))
    fake.answer("Inference.Detokenize", tasks_pb2.DetokenizeResponse(text="hi"))
    assert client.tokenize("hi") == (4, 2)
    assert client.detokenize([4, 2]) == "hi"
    assert [list(fake.calls[1].request.token_ids), fake.calls[0].request.text] == [[4, 2], "hi"]


def test_unset_differs_from_zero(fake: FakeChorus, client: Client) -> None:
    sampling = ask(fake, client, "hi", temperature=0.0, seed=None).sampling
    assert sampling.HasField("temperature")
    assert not sampling.HasField("seed")
    assert not sampling.HasField("max_tokens")


@pytest.mark.parametrize(
    ("prompt", "kwargs", "field"),
    [
        ("hi", {"seed": -1}, "sampling.seed"),
        ("hi", {"max_tokens": 2**40}, "sampling.max_tokens"),
        ("hi", {"temperature": "hot"}, "sampling.temperature"),
        ("hi", {"stop": "abc"}, "sampling.stop"),
        ("hi", {"stop_token_ids": [-1]}, "sampling.stop_token_ids"),
        ([-1], {}, "token_ids"),
        ([1.5], {}, "token_ids"),
        ("\udc80", {}, "text"),
        ("hi", {"adapter": "\udc80"}, "adapter"),
        ("hi", {"logit_bias": {-1: 1.0}}, "sampling.logit_bias"),
        ("hi", {"logit_bias": [7]}, "sampling.logit_bias"),
        ("hi", {"n": True}, "sampling.n"),
        ("hi", {"priority": 2**40}, "priority"),
        ([{"role": "user"}], {}, "messages[0]"),
        ([{"role": "user", "content": 5}], {}, "messages[0].content"),
        ([{"role": "user", "content": "hi"}, "hi"], {}, "messages[1]"),
    ],
)
def test_what_the_wire_can_not_hold_is_refused_by_name(
    fake: FakeChorus, client: Client, prompt: Any, kwargs: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        client.generate(prompt, **kwargs)
    assert [violation.field for violation in caught.value.violations] == [field]
    assert not fake.calls


def test_a_misspelt_parameter_is_not_dropped(client: Client) -> None:
    with pytest.raises(TypeError, match="temprature"):
        client.generate("hi", temprature=0.1)  # type: ignore[call-arg]


def test_every_call_carries_the_clients_deadline(fake: FakeChorus) -> None:
    fake.answer("Inference.GetModel", model_pb2.Model())
    fake.answer("Inference.Generate", DONE)
    with Client(fake.address, timeout=30) as client:
        client.model()
        client.generate("hi")
    assert [round(call.time_left or 0, -1) for call in fake.calls] == [30, 30]


def test_a_calls_own_timeout_replaces_the_clients(fake: FakeChorus) -> None:
    fake.answer("Inference.Generate", DONE)
    with Client(fake.address, timeout=30) as client:
        client.generate("hi", timeout=90)
    assert round(fake.calls[0].time_left or 0, -1) == 90


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf")])
def test_a_timeout_that_is_none_is_refused(timeout: float) -> None:
    with pytest.raises(InvalidArgument, match="timeout"):
        Client("127.0.0.1:1", timeout=timeout)


def test_the_tenant_goes_as_metadata(fake: FakeChorus) -> None:
    fake.answer("Inference.Generate", DONE)
    with Client(fake.address, tenant="acme") as client:
        client.generate("hi")
    assert fake.calls[0].metadata["chorus-tenant"] == "acme"


@pytest.mark.parametrize("tenant", ["", "Acme", "a\nb", "ä", "-a"])
def test_a_tenant_that_no_server_accepts_is_refused(tenant: str) -> None:
    with pytest.raises(InvalidArgument, match="tenant"):
        Client("127.0.0.1:1", tenant=tenant)


def test_a_missing_address_is_named(fake: FakeChorus) -> None:
    with Client(None, admin=fake.address) as client, pytest.raises(ValueError, match="no server"):
        client.generate("hi")
    with Client(fake.address) as client, pytest.raises(ValueError, match="no admin"):
        client.residency()


def test_the_models_facts_are_told(fake: FakeChorus, client: Client) -> None:
    fake.answer("Inference.GetModel", model_pb2.Model(name="tiny", context_length=512, eos_token_ids=[2]))
    model = client.model()
    assert (model.name, model.context_length, model.eos_token_ids) == ("tiny", 512, (2,))


def test_adapters_are_listed_over_all_pages(fake: FakeChorus, client: Client) -> None:
    for names, token in ((["a", "b"], "next"), (["c"], "")):
        adapters = [adapter_pb2.Adapter(name=name) for name in names]
        page = inference_pb2.ListAdaptersResponse(adapters=adapters, next_page_token=token)
        fake.answer("Inference.ListAdapters", page)
    assert [adapter.name for adapter in client.adapters("acme")] == ["a", "b", "c"]
    assert [(call.request.parent, call.request.page_token) for call in fake.calls] == [
        ("tenants/acme", ""),
        ("tenants/acme", "next"),
    ]


def test_one_adapter_is_got_by_short_name(fake: FakeChorus, client: Client) -> None:
    fake.answer("Inference.GetAdapter", adapter_pb2.Adapter(name="n", aliases={"live": "ab"}, etag="e"))
    adapter = client.adapter("acme/support")
    assert (adapter.name, adapter.aliases, adapter.etag) == ("n", {"live": "ab"}, "e")
    assert fake.calls[0].request.name == "tenants/acme/adapters/support"


async def test_calls_share_one_connection(fake: FakeChorus) -> None:
    fake.answer("Inference.Generate", DONE, times=6)
    with Client(fake.address, timeout=20) as client:
        for _ in range(3):
            client.generate("hi")
    async with AsyncClient(fake.address, timeout=20) as patient:
        for _ in range(3):
            await patient.generate("hi")
    peers = [call.peer for call in fake.calls_of("Inference.Generate")]
    assert len(set(peers[:3])) == 1
    assert len(set(peers[3:])) == 1


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:50051", "HTTPS://host:1", "127.0.0.1", "localhost:", "host:port"]
)
def test_an_address_that_is_none_is_refused_with_its_form(address: str) -> None:
    with pytest.raises(InvalidArgument, match=r"server .*: must be HOST:PORT"):
        Client(address)
    with pytest.raises(InvalidArgument, match=r"admin .*: must be HOST:PORT"):
        Client(None, admin=address)


@pytest.mark.parametrize(
    "address", ["[::1]:50051", "dns:///chorus.internal:443", "unix:/run/chorus.sock", "ipv4:1.2.3.4:5"]
)
def test_grpcs_own_forms_of_addresses_pass(address: str) -> None:
    Client(address).close()
