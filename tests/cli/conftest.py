import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from chorus.cli.main import app
from client.fake_chorus import FakeChorus

Run = Callable[..., Result]


@pytest.fixture
def fake() -> Iterator[FakeChorus]:
    with FakeChorus() as server:
        yield server


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("CHORUS_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def run() -> Run:
    """Runs `chorus` with these arguments in this process."""
    return lambda *args: CliRunner().invoke(app, [str(arg) for arg in args], prog_name="chorus")


@pytest.fixture
def run_json(run: Run) -> Callable[..., Any]:
    """Runs `chorus ... --json`; it must succeed, print exactly one JSON object and say nothing else."""

    def call(*args: object) -> Any:
        result = run(*args, "--json")
        assert (result.exit_code, result.stderr) == (0, "")
        [line] = result.stdout.splitlines()
        return json.loads(line)

    return call


@pytest.fixture
def chorus() -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Runs the installed console script as a process of its own."""
    script = Path(sys.executable).with_name("chorus")
    return lambda *args: subprocess.run(
        [str(script), *map(str, args)], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")
    (path / "adapter_model.safetensors").write_bytes(b"12345678")
    return path
