"""Fault 35: what one tenant has computed is not found by another, nor what one version has by another."""

from itertools import count

import pytest

from chorus.client import Client
from chorus.v1 import generate_pb2, inference_pb2_grpc
from support.claims import assert_solo_greedy
from support.server import ServerProcess
from support.worlds import TinyWorld

PAGE = 32
FIRST = count(5)


@pytest.fixture
def prompt() -> list[int]:
    """Two full pages and a tail, like no other test's."""
    first = next(FIRST)
    return [first, *(5 + i * 7 % 80 for i in range(2 * PAGE + 5))]


def ask(server: ServerProcess, prompt: list[int], *, tenant: str = "", adapter: str = "") -> tuple[list[int], int]:
    """The greedy answer's tokens, and how many of the prompt's were cached."""
    sampling = generate_pb2.SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    request = generate_pb2.GenerateRequest(
        token_ids=generate_pb2.TokenIds(ids=prompt), sampling=sampling, adapter=adapter
    )
    metadata = (("chorus-tenant", tenant),) if tenant else ()
    with server.channel() as channel:
        messages = list(inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=30, metadata=metadata))
    return [token for message in messages for token in message.token_ids], messages[-1].usage.cached_tokens


def test_tenants_do_not_find_each_others_prompts(calm: ServerProcess, prompt: list[int]) -> None:
    before = calm.scrape().value("chorus_cached_prompt_tokens_total")
    answers = [ask(calm, prompt, tenant=tenant) for tenant in ("a35", "b35", "a35", "b35", "")]
    assert [cached for _, cached in answers] == [0, 0, 2 * PAGE, 2 * PAGE, 0]
    assert len({tuple(tokens) for tokens, _ in answers}) == 1
    assert calm.scrape().value("chorus_cached_prompt_tokens_total") == before + 4 * PAGE


def test_tenants_with_the_same_weights_do_not_find_each_others_prompts(
    calm: ServerProcess, client: Client, world: TinyWorld, prompt: list[int]
) -> None:
    names = [client.push(world.adapter("first"), tenant=tenant, name="same").version for tenant in ("a35", "b35")]
    cached = [ask(calm, prompt, adapter=name)[1] for name in (names[0], names[1], names[0])]
    assert cached == [0, 0, 2 * PAGE]


def test_versions_do_not_find_each_others_prompts_and_answer_as_themselves(
    calm: ServerProcess, client: Client, world: TinyWorld, prompt: list[int]
) -> None:
    folders = [world.adapter("first"), world.adapter("second")]
    versions = [client.push(folder, tenant="a35", name="moves").version for folder in folders]
    for turn in range(2):
        for folder, version in zip(folders, versions, strict=True):
            tokens, cached = ask(calm, prompt, adapter=version)
            assert cached == 2 * PAGE * turn
            assert_solo_greedy(world.base, folder, prompt, tokens)
