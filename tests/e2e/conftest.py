"""Two servers: one on a tiny base whose every token the oracle knows, one on the embedded base, which speaks text."""

from collections.abc import Iterator

import pytest

from chorus.client import Client
from support.server import ServerProcess
from support.worlds import TinyWorld


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return TinyWorld(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def tiny(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """With 1 MiB for adapters, which is 80 rank rows at each site."""
    state = tmp_path_factory.mktemp("tiny") / "state"
    options = ("--dtype", "float32", "--kv-cache-mb", "4", "--adapter-memory-mb", "1", "--max-rank", "64")
    with ServerProcess(state, "--model", str(world.base), *options) as server:
        yield server
        assert not any("Traceback" in line for line in server.log), "".join(server.log)


@pytest.fixture(scope="session")
def client(tiny: ServerProcess) -> Iterator[Client]:
    with tiny.client() as client:
        yield client


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """`chorus serve` without a model; steps of at least 10 ms, so that a stream can be watched."""
    state = tmp_path_factory.mktemp("embedded") / "state"
    with ServerProcess(state, "--kv-cache-mb", "64", failpoints="engine.forward=sleep:0.01") as server:
        yield server
        assert not any("Traceback" in line for line in server.log), "".join(server.log)
