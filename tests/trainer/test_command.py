"""`chorus train` from outside: output, exit codes, Ctrl-C."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from chorus.cli.main import app
from chorus.trainer.config import TrainConfig
from chorus.trainer.loop import train


@pytest.fixture
def config_file(config: TrainConfig, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


def chorus(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def test_json_is_one_line_that_tells_the_result(config_file: Path, tmp_path: Path) -> None:
    result = chorus(config_file, "--output", tmp_path / "out", "--json", "--set", "train.steps=3")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert found["output"] == str(tmp_path / "out")
    assert found["steps"] == 3
    card = json.loads((tmp_path / "out/task.json").read_text())
    assert found["validation_loss"] == card["metrics"]["validation_loss"]


def test_the_summary_says_what_to_do_next(config_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "my adapter"
    result = chorus(config_file, "-o", output, "--set", "train.steps=2", "--set", "data.max_length=14")
    assert result.exit_code == 0, result.output
    assert "validation loss" in result.stdout
    assert f"chorus adapters push {shlex.quote(str(output))} --tenant" in result.stdout
    assert "cut from the left" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "exit_code", "what"),
    [
        (["--set", "train.stepz=3"], 2, "train.stepz: unknown key"),
        (["--set", "train.steps"], 2, "train.steps=10"),
        (["--set", "data.train=nowhere.jsonl"], 1, "nowhere.jsonl: No such file"),
        (["--set", "base=/nowhere"], 1, "no folder /nowhere"),
        (["--frobnicate"], 2, "--frobnicate"),
    ],
)
def test_errors_are_one_line_on_stderr(
    config_file: Path, tmp_path: Path, arguments: list[str], exit_code: int, what: str
) -> None:
    result = chorus(config_file, "--output", tmp_path / "out", *arguments)
    assert result.exit_code == exit_code
    assert what in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert not (tmp_path / "out").exists()


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from chorus.cli.main import main; main()", "train", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_ctrl_c_exits_130_and_leaves_nothing(config_file: Path, tmp_path: Path) -> None:
    process = start(config_file, "--output", tmp_path / "out", "--set", "train.steps=1000000")
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size > 2000 for path in tmp_path.glob(".out.partial-*/train_log.jsonl")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (stdout, stderr.count("\n")) == ("", 1)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_another_process_writes_the_same_bytes(config: TrainConfig, config_file: Path, tmp_path: Path) -> None:
    process = start(config_file, "--output", tmp_path / "there", "--json")
    train(config, tmp_path / "here")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    for name in ("adapter_config.json", "adapter_model.safetensors", "task.json"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
