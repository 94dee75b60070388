"""Servers that the faults of `faults.md` meet; each is started once, as starting costs seconds."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from chorus.client import Client
from faults.draining import Cut, Drain, observe_cut, observe_drain
from support.server import ServerProcess, together
from support.worlds import TinyWorld

# Steps of at least 5 ms: a stream of 200 tokens is still under way when the call after its first token arrives.
CALM = "engine.forward=sleep:0.005"
SLOW = "engine.forward=sleep:0.1;residency.load=sleep:1.5"
TWO_ROWS = ("--max-rows", "2")
# The KV cache has 85 blocks of 16 tokens: a handful of requests uses every page again.
OPTIONS = ("--dtype", "float32", "--kv-cache-mb", "1", "--max-rank", "16")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return TinyWorld(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def calm(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A healthy server with four rows, for the faults that must not kill it."""
    state = tmp_path_factory.mktemp("calm") / "state"
    with ServerProcess(state, "--model", str(world.base), *OPTIONS, "--max-rows", "4", failpoints=CALM) as server:
        yield server
        assert server.alive, "a fault has killed the server:\n" + "".join(server.log)
        assert not any("Traceback" in line for line in server.log), "".join(server.log)


@pytest.fixture(scope="session")
def client(calm: ServerProcess) -> Iterator[Client]:
    with calm.client() as client:
        yield client


@pytest.fixture(scope="session")
def narrow(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Four rows, four places in the queue, 64 unread tokens, messages of 1 MiB, steps of 20 ms: easily too much.

    64 tokens are over a second of one stream: readers that are not slow are not taken for it where the machine is.
    """
    state = tmp_path_factory.mktemp("narrow") / "state"
    limits = ("--max-rows", "4", "--max-queue", "4", "--max-message-mb", "1", "--stream-queue-tokens", "64")
    options = ("--model", str(world.base), *OPTIONS, *limits)
    with ServerProcess(state, *options, failpoints="engine.forward=sleep:0.02") as server:
        yield server
        assert server.alive, "a fault has killed the server:\n" + "".join(server.log)
        assert not any("Traceback" in line for line in server.log), "".join(server.log)


@pytest.fixture(scope="session")
def slow_state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state folder of `drain`'s server, and then of `restarted`."""
    return tmp_path_factory.mktemp("slow") / "state"


@pytest.fixture(scope="session")
def drains(world: TinyWorld, slow_state: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Drain, Cut]:
    """Two servers that had SIGTERM: one with time enough, one without."""
    state = tmp_path_factory.mktemp("cut") / "state"
    options = ("--model", str(world.base), *OPTIONS)
    with together(
        ServerProcess(slow_state, *options, *TWO_ROWS, "--drain-grace-s", "20", failpoints=SLOW),
        ServerProcess(state, *options, "--drain-grace-s", "0.5", failpoints="residency.load=sleep:30"),
    ) as (patient, hasty):
        return observe_drain(patient, world), observe_cut(hasty, world)


@pytest.fixture(scope="session")
def drain(drains: tuple[Drain, Cut]) -> Drain:
    return drains[0]


@pytest.fixture(scope="session")
def cut(drains: tuple[Drain, Cut]) -> Cut:
    return drains[1]


@pytest.fixture(scope="session")
def restarted(world: TinyWorld, slow_state: Path, drain: Drain) -> Iterator[ServerProcess]:
    """A slow server on what the drained one left."""
    options = ("--model", str(world.base), *OPTIONS, *TWO_ROWS)
    with ServerProcess(slow_state, *options, failpoints=SLOW) as server:
        yield server
        assert server.alive, "".join(server.log)
        assert not any("Traceback" in line for line in server.log), "".join(server.log)
