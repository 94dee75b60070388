"""Fault 16: adapters come and go while others decode, and nobody's tokens change."""

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from chorus.client import Client
from faults.conftest import OPTIONS
from support.claims import assert_solo_greedy
from support.server import ServerProcess
from support.worlds import PROMPT, TinyWorld

EVICTIONS, LOADS, STEPS = "chorus_adapter_evictions_total", "chorus_adapter_loads_total", "chorus_engine_steps_total"
# A site has 80 rank rows: the two that decode take 16, two of the others fit beside them.
STAYING = ("", "stays-1", "stays-2")
PASSING = {f"passes-{i}": 32 for i in range(6)}
TOKENS = 160
PER_SECOND, STEP_S = 10, 0.01


@pytest.fixture(scope="module", params=[0, 16], ids=["from-disk", "from-host-memory"])
def host_mb(request: pytest.FixtureRequest) -> int:
    """For copies of adapters: none, or all that there are."""
    return int(request.param)


@pytest.fixture(scope="module")
def tight(world: TinyWorld, host_mb: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Adapter memory of 1 MiB, and steps of at least 10 ms."""
    options = ("--model", str(world.base), *OPTIONS[:-1], "64", "--adapter-memory-mb", "1", "--max-rows", "8")
    state = tmp_path_factory.mktemp("tight") / "state"
    slow = f"engine.forward=sleep:{STEP_S}"
    with ServerProcess(state, *options, "--adapter-host-mb", str(host_mb), failpoints=slow) as server:
        yield server
        assert server.alive
        assert not any("Traceback" in line for line in server.log), "".join(server.log)


def decode(client: Client) -> list[tuple[int, ...]]:
    """The base and the adapters that stay, in one batch."""

    def tokens(name: str) -> tuple[int, ...]:
        adapter = f"t16/{name}" if name else ""
        return client.generate(PROMPT, adapter=adapter, max_tokens=TOKENS, temperature=0, ignore_eos=True).token_ids

    with ThreadPoolExecutor(len(STAYING)) as threads:
        return list(threads.map(tokens, STAYING))


@contextmanager
def churn(client: Client) -> Iterator[dict[str, set[tuple[int, ...]]]]:
    """Asks one passing adapter after the other for tokens, each of which has to be loaded, 20 times a second.

    Gives what each has answered.
    """
    over, answers = threading.Event(), defaultdict[str, set[tuple[int, ...]]](set)

    def come_and_go() -> None:
        while not over.is_set():
            for name in PASSING:
                began = time.monotonic()
                answer = client.generate(PROMPT, adapter=f"t16/{name}", max_tokens=2, temperature=0)
                answers[name].add(answer.token_ids)
                over.wait(max(0.05 - (time.monotonic() - began), 0))

    with ThreadPoolExecutor(1) as thread:
        passing = thread.submit(come_and_go)
        try:
            yield answers
        finally:
            over.set()
            passing.result(20)


def test_adapters_that_come_and_go_change_nobodys_tokens(tight: ServerProcess, host_mb: int, world: TinyWorld) -> None:
    with tight.client() as client:
        for name, rank in {"stays-1": 8, "stays-2": 8, **PASSING}.items():
            client.push(folder(world, name, rank), tenant="t16", name=name)
        quiet = decode(client)
        assert len(set(quiet)) == len(STAYING), "the adapters make no difference"
        before = tight.scrape()
        with churn(client) as passing:
            disturbed = decode(client)
        after = tight.scrape()
    evictions = after.value(EVICTIONS, tier="device") - before.value(EVICTIONS, tier="device")
    steps = after.value(STEPS) - before.value(STEPS)
    # Counted in steps: a slow machine is slow at both.
    assert evictions > PER_SECOND * STEP_S * steps / 2, "hardly anything came and went"
    host, disk = (after.value(LOADS, source=it) - before.value(LOADS, source=it) for it in ("host", "disk"))
    assert host == 0 if host_mb == 0 else disk <= len(PASSING) < host
    assert disturbed == quiet
    assert {name: len(answers) for name, answers in passing.items()} == dict.fromkeys(PASSING, 1), "answers changed"
    assert len(set.union(*passing.values())) > 1, "the passing adapters make no difference"
    assert_solo_greedy(world.base, folder(world, "stays-1", 8), PROMPT, disturbed[1][:24])


def folder(world: TinyWorld, name: str, rank: int) -> Path:
    return world.adapter(name, r=rank)
