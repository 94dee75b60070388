"""A real engine in its own process: answers, refuses, stops, and is missed when it is gone."""

import asyncio
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import psutil
import pytest

from chorus.config import ServerConfig
from chorus.engine.messages import Early, Sampling, StepEvents, Submit, Tokens
from chorus.errors import NotFound
from chorus.services.engine_process import EngineProcess
from services.harness import until


class Attached:
    """An engine's process, and what it told."""

    def __init__(self, config: ServerConfig) -> None:
        self.engine = EngineProcess(config)
        self.steps: list[StepEvents | Early] = []
        self.deaths: list[BaseException] = []
        self.engine.load()
        self.engine.attach(self._hear, self.deaths.append).start()
        self.process = psutil.Process(self.engine.pid)

    def _hear(self, steps: Sequence[StepEvents | Early]) -> None:
        self.steps += steps

    @property
    def tokens(self) -> list[Tokens]:
        return [event for step in self.steps for event in step.events if isinstance(event, Tokens)]

    @property
    def gone(self) -> bool:
        return not self.process.is_running() or self.process.status() == psutil.STATUS_ZOMBIE


@pytest.fixture
async def attached(tmp_path: Path) -> AsyncIterator[Attached]:
    attached = Attached(ServerConfig(threads=1, state_dir=tmp_path, kv_cache_mb=16, adapter_memory_mb=16))
    yield attached
    await asyncio.to_thread(attached.engine.stop)
    await asyncio.sleep(0)
    assert attached.gone


async def test_it_answers_shrugs_off_signals_and_stops_without_a_death(attached: Attached) -> None:
    attached.process.send_signal(signal.SIGINT)
    attached.process.send_signal(signal.SIGTERM)
    attached.engine.send(Submit(1, (1, 2, 3), Sampling(5, temperature=0.0, ignore_eos=True)))
    await until(lambda: len(attached.tokens) == 5, 20)
    assert [event.first for event in attached.tokens] == [True, False, False, False, False]
    await asyncio.to_thread(attached.engine.stop)
    await asyncio.sleep(0.1)
    assert attached.gone
    assert attached.deaths == []


async def test_its_death_is_told_once_and_commands_after_it_are_harmless(attached: Attached) -> None:
    attached.process.kill()
    await until(lambda: bool(attached.deaths), 10)
    assert "-9" in str(attached.deaths[0])
    attached.engine.send(Submit(1, (1, 2, 3), Sampling(5)))
    await asyncio.sleep(0.1)
    assert len(attached.deaths) == 1


def test_a_base_that_can_not_be_loaded_is_refused_with_the_engines_own_error(tmp_path: Path) -> None:
    engine = EngineProcess(ServerConfig(model=str(tmp_path / "nowhere"), state_dir=tmp_path))
    try:
        with pytest.raises(NotFound, match="nowhere"):
            engine.load()
    finally:
        engine.stop()
