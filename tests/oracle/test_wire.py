"""What goes over the wire is what transformers and peft say of the same tokens."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from chorus.admin.v1 import adapters_pb2_grpc
from chorus.config import ServerConfig
from chorus.engine.pacing import Pacer
from chorus.engine.thread import EngineThread
from chorus.failpoints import VARIABLE
from chorus.models.base import load_base
from chorus.services.assembly import ChorusServer, ServedBase
from chorus.v1 import generate_pb2, inference_pb2_grpc, tasks_pb2
from services.fakes import upload
from services.harness import refused, until
from support.engines import make_engine
from support.tiny import solo_logits
from support.worlds import CONFIG, PROMPT, TENSORS, TinyWorld

NEW = 10
NAMES = ["", "tenants/a/adapters/r8"]
CLOSE: dict[str, Any] = {"rel": 1e-5, "abs": 1e-4}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return TinyWorld(tmp_path_factory.mktemp("world"))


def adapter_of(world: TinyWorld, name: str) -> Path | None:
    return world.adapter(name.rsplit("/", 1)[1]) if name else None


@dataclass(frozen=True, slots=True)
class Wire:
    """A server over a real engine, in this process, with the world's adapter published."""

    inference: Any
    server: ChorusServer

    def value(self, metric: str) -> float:
        return float(self.server.metrics.registry.get_sample_value(metric) or 0.0)

    async def generate(
        self, adapter: str, within_s: float = 30, **sampling: Any
    ) -> list[generate_pb2.GenerateResponse]:
        request = generate_pb2.GenerateRequest(
            adapter=adapter,
            token_ids=generate_pb2.TokenIds(ids=PROMPT),
            sampling=generate_pb2.SamplingParams(**{"max_tokens": NEW, "ignore_eos": True, **sampling}),
        )
        return [message async for message in self.inference.Generate(request, timeout=within_s)]


@pytest.fixture
async def wire(world: TinyWorld, tmp_path: Path) -> AsyncIterator[Wire]:
    ports = {"port": 0, "admin_port": 0, "metrics_port": 0}
    config = ServerConfig.model_validate({**ports, "state_dir": tmp_path, "drain_grace_s": 1.0})
    base = load_base(str(world.base), device="cpu", dtype="float32")
    server = ChorusServer(
        config,
        ServedBase(base.facts, None),
        lambda on_events, on_death: EngineThread(
            lambda wake: make_engine(world.base, wake=wake), Pacer(on_events).take, on_death
        ),
    )
    try:
        ports_taken = await server.start()
        async with (
            grpc.aio.insecure_channel(f"127.0.0.1:{ports_taken.port}") as channel,
            grpc.aio.insecure_channel(f"127.0.0.1:{ports_taken.admin_port}") as admin,
        ):
            folder = world.adapter("r8")
            files = {name: (folder / name).read_bytes() for name in (CONFIG, TENSORS)}
            await adapters_pb2_grpc.AdaptersStub(admin).CreateAdapterVersion(upload(NAMES[1], files, chunk=1 << 16))
            yield Wire(inference_pb2_grpc.InferenceStub(channel), server)
    finally:
        await server.close()


def log_softmax(world: TinyWorld, name: str, tokens: list[int]) -> torch.Tensor:
    """[T, V] of transformers, under peft for an adapter; row t is about token t + 1."""
    return solo_logits(world.base, adapter_of(world, name), tokens).double().log_softmax(-1)


def by_index(messages: list[generate_pb2.GenerateResponse]) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = defaultdict(list)
    for message in messages:
        tokens[message.index] += message.token_ids
    return dict(tokens)


@pytest.mark.parametrize("name", NAMES)
async def test_outputs_are_those_of_requests_with_the_seeds_that_follow(wire: Wire, name: str) -> None:
    hot = {"temperature": 1.5, "presence_penalty": 0.5, "repetition_penalty": 1.2}
    together = by_index(await wire.generate(name, seed=40, n=4, **hot))
    alone = [by_index(await wire.generate(name, seed=40 + i, **hot))[0] for i in range(4)]
    assert len({tuple(tokens) for tokens in alone}) == 4
    assert together == dict(enumerate(alone))


@pytest.mark.parametrize("name", NAMES)
async def test_logprobs_are_transformers(wire: Wire, world: TinyWorld, name: str) -> None:
    messages = await wire.generate(name, temperature=1.3, seed=3, logprobs=5, prompt_logprobs=2, logit_bias={5: 30.0})
    tokens = [token for message in messages for token in message.token_ids]
    entries = [entry for message in messages for entry in message.logprobs]
    assert len(tokens) == len(entries) == NEW
    expected = log_softmax(world, name, PROMPT + tokens)
    for at, (token, entry) in enumerate(zip(tokens, entries, strict=True), len(PROMPT) - 1):
        assert_entry(entry, expected[at], token, 5)
    prompt = list(messages[0].prompt_logprobs)
    assert len(prompt) == len(PROMPT) - 1
    for at, entry in enumerate(prompt):
        assert_entry(entry, expected[at], PROMPT[at + 1], 2)


def assert_entry(entry: generate_pb2.TokenLogprobs, expected: torch.Tensor, token: int, top: int) -> None:
    """The token's own, and the likeliest: their ids wherever they stand clear of the next."""
    assert entry.logprob == pytest.approx(float(expected[token]), **CLOSE)
    likeliest = expected.topk(top + 1)
    assert sorted(entry.top.values(), reverse=True) == pytest.approx(likeliest.values[:top].tolist(), **CLOSE)
    if likeliest.values[top - 1] - likeliest.values[top] > 1e-3:
        assert set(entry.top) == set(likeliest.indices[:top].tolist())


@pytest.mark.parametrize("name", NAMES)
async def test_scores_are_transformers_sums(wire: Wire, world: TinyWorld, name: str) -> None:
    continuations = [[3, 5, 8], [90], [2, 2, 4, 6, 1, 7, 9, 12, 60, 33, 34]]
    request = tasks_pb2.ScoreRequest(
        adapter=name,
        prompt_token_ids=PROMPT,
        continuation_token_ids=[generate_pb2.TokenIds(ids=ids) for ids in continuations],
    )
    response = await wire.inference.Score(request, timeout=30)
    for score, continuation in zip(response.scores, continuations, strict=True):
        rows = log_softmax(world, name, PROMPT + continuation)[len(PROMPT) - 1 : -1]
        expected = [float(row[token]) for row, token in zip(rows, continuation, strict=True)]
        assert list(score.token_ids) == continuation
        assert list(score.token_logprobs) == pytest.approx(expected, **CLOSE)
        assert score.logprob == pytest.approx(sum(expected), **CLOSE)


async def test_adapters_scores_differ_from_the_bases(wire: Wire) -> None:
    continuation = [generate_pb2.TokenIds(ids=[3, 5])]
    scores = [
        (
            await wire.inference.Score(
                tasks_pb2.ScoreRequest(adapter=name, prompt_token_ids=PROMPT, continuation_token_ids=continuation)
            )
        )
        .scores[0]
        .logprob
        for name in NAMES
    ]
    assert abs(scores[0] - scores[1]) > 0.1


async def test_prompt_and_continuation_may_fill_the_context(wire: Wire) -> None:
    request = tasks_pb2.ScoreRequest(
        prompt_token_ids=[5] * 200, continuation_token_ids=[generate_pb2.TokenIds(ids=[7] * 56)]
    )
    assert len((await wire.inference.Score(request, timeout=30)).scores[0].token_logprobs) == 56
    request.continuation_token_ids[0].ids.append(7)
    assert (await refused(wire.inference.Score(request, timeout=30))).reason == "PROMPT_TOO_LONG"


async def test_deadline_ends_running_and_queued_work_and_the_next_call_is_served(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a token costs is known then from more than one cold step, by which who comes late would be refused at once.
    for _ in range(3):
        await wire.generate("", max_tokens=8)
    monkeypatch.setenv(VARIABLE, "engine.forward=sleep:0.01")
    started = "chorus_request_queue_time_seconds_count"
    before = wire.value(started)

    async def call(within_s: float) -> str:
        try:
            await wire.generate("", within_s, max_tokens=240)
        except grpc.aio.AioRpcError as error:
            return str(error.code().name)
        return "OK"

    # Sixteen rows run, the others wait behind them; none can be through in time.
    ends = await asyncio.gather(*(call(0.5) for _ in range(40)))
    monkeypatch.delenv(VARIABLE)
    assert set(ends) == {"DEADLINE_EXCEEDED"}
    await until(lambda: wire.value("chorus_requests_running") == wire.value("chorus_requests_waiting") == 0)
    assert wire.value("chorus_kv_cache_usage_ratio") == 0
    assert wire.value(started) - before < len(ends), "none has expired in the queue"
    assert await call(30) == "OK"
