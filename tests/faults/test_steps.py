"""Faults 24 and 25: a request that makes a step fail, a step without memory, a device that is lost."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from grpc_health.v1 import health_pb2_grpc

from chorus.errors import InternalError, ResourceExhausted, Unavailable
from chorus.v1 import generate_pb2, inference_pb2_grpc
from faults.draining import NOT_SERVING, SERVING, watch
from support.claims import assert_solo_greedy, refused, until
from support.server import ServerProcess, together
from support.tiny import VOCAB, solo_greedy
from support.worlds import PROMPT, TinyWorld

GREEDY: dict[str, Any] = {"max_tokens": 80, "temperature": 0, "ignore_eos": True}
NEIGHBOURS = ("r8", "r4", "")


@dataclass
class Servers:
    """One whose steps fail with the tokens `poison` and `too_large`, and one that loses its device with `fatal`."""

    folders: dict[str, Path | None]
    poison: int
    too_large: int
    fatal: int
    poisoned: ServerProcess
    fragile: ServerProcess


@pytest.fixture(scope="module")
def servers(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folders: dict[str, Path | None] = {"": None, "r8": world.adapter("r8"), "r4": world.adapter("r4", r=4)}
    answers = [solo_greedy(world.base, folders[name], PROMPT, GREEDY["max_tokens"])[0] for name in NEIGHBOURS]
    # Tokens that nobody else has: a neighbour that comes upon one would be guilty itself.
    poison, too_large, fatal = sorted(set(range(3, VOCAB)) - set(PROMPT) - set(chain(*answers)))[:3]
    options = ("--model", str(world.base), "--dtype", "float32", "--kv-cache-mb", "1", "--max-rank", "16")
    states = [tmp_path_factory.mktemp(name) / "state" for name in ("poisoned", "fragile")]
    points = [f"error@{poison}", f"memory@{too_large}", f"device@{fatal}", "sleep:0.02"]
    rules = [f"engine.forward={point}" for point in points]
    with together(
        ServerProcess(states[0], *options, "--max-rows", "4", failpoints=";".join((*rules[:2], rules[3]))),
        ServerProcess(states[1], *options, failpoints=";".join(rules[2:])),
    ) as (poisoned, fragile):
        yield Servers(folders, poison, too_large, fatal, poisoned, fragile)


def with_token(token: int) -> list[int]:
    return [*PROMPT, token, *PROMPT]


def test_a_request_that_makes_the_step_fail_costs_itself_alone(servers: Servers, world: TinyWorld) -> None:
    server, folders = servers.poisoned, servers.folders
    under_way = Barrier(len(NEIGHBOURS) + 1)
    with server.client() as client, ThreadPoolExecutor(len(NEIGHBOURS)) as threads:
        for name in ("r8", "r4"):
            client.push(folders[name] or world.base, tenant="good", name=name)

        def neighbour(name: str) -> list[int]:
            with client.stream(PROMPT, adapter=name and f"good/{name}", **GREEDY) as stream:
                tokens = list(next(stream).token_ids)
                under_way.wait(30)
                for delta in stream:
                    tokens += delta.token_ids
            return tokens

        answers = {name: threads.submit(neighbour, name) for name in NEIGHBOURS}
        under_way.wait(30)
        with pytest.raises(InternalError) as poisoned:
            client.generate(with_token(servers.poison), **GREEDY)
        with pytest.raises(ResourceExhausted) as too_large:
            client.generate(with_token(servers.too_large), **GREEDY)
        beside = server.scrape().value("chorus_requests_running")
        for name, answer in answers.items():
            assert_solo_greedy(world.base, folders[name], PROMPT, answer.result(30))
        assert beside == len(NEIGHBOURS), "nobody was beside it: nothing was tested"
        incident = re.fullmatch(r"the step failed; incident ([0-9a-f]{12})", poisoned.value.message)
        assert incident, poisoned.value.message
        server.wait_for_log(incident[1])
        assert (too_large.value.reason, too_large.value.retry_after_s) == ("STEP_OUT_OF_MEMORY", 1.0)
        until(lambda: client.residency().totals.kv_blocks_used == 0, "all pages are free")
    assert server.alive


def test_a_lost_device_flips_health_ends_every_stream_and_exits_with_an_error(servers: Servers) -> None:
    server = servers.fragile
    seen: list[int] = []
    under_way = Barrier(2)

    def end_of_stream() -> str:
        """Why a stream that was under way ended; empty if it came to its own end."""
        with server.client() as client, client.stream(PROMPT, **GREEDY) as stream:
            next(stream)
            under_way.wait(30)
            try:
                for _ in stream:
                    pass
            except Unavailable as error:
                return error.reason
        return ""

    with server.channel() as channel, ThreadPoolExecutor(2) as threads:
        watching = threads.submit(watch, health_pb2_grpc.HealthStub(channel), seen)
        until(lambda: seen == [SERVING], "health says SERVING")
        running = threads.submit(end_of_stream)
        under_way.wait(30)
        stub = inference_pb2_grpc.InferenceStub(channel)
        fatal = generate_pb2.GenerateRequest(token_ids=generate_pb2.TokenIds(ids=with_token(servers.fatal)))
        with refused("UNAVAILABLE") as refusal:
            list(stub.Generate(fatal, timeout=20))
        assert refusal.reason == "ENGINE_DEAD"
        assert running.result(20) == "ENGINE_DEAD"
        watching.result(20)
        assert seen == [SERVING, NOT_SERVING]
        assert server.wait(20) > 0, "it said that all was well, or died of a signal"
