"""`chorus train` from outside: output, exit codes, what it publishes. Signals: `test_resume`."""

import json
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from chorus.cli.main import app
from chorus.trainer.config import TrainConfig
from chorus.trainer.loop import train
from support.server import ServerProcess


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
        (["--resume"], 1, "leave --resume out to begin anew"),
        (["--publish", "127.0.0.1:50052", "acme"], 2, "'acme' must look like acme/support"),
        (["--publish", "localhost", "acme/support"], 2, "'localhost' must look like 127.0.0.1:50052"),
        (["--alias", "canary"], 2, "--alias goes with --publish"),
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


def test_another_process_writes_the_same_bytes(config: TrainConfig, config_file: Path, tmp_path: Path) -> None:
    process = start(config_file, "--output", tmp_path / "there", "--json")
    train(config, tmp_path / "here")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    for name in ("adapter_config.json", "adapter_model.safetensors", "task.json"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()


def test_the_adapter_is_published_and_answers(config_file: Path, base_folder: Path, tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "state", "--model", str(base_folder), "--dtype", "float32") as server:
        options = ["--publish", server.admin, "acme/support", "--alias", "canary", "--json"]
        result = chorus(config_file, "--output", tmp_path / "out", *options)
        assert result.exit_code == 0, result.output
        version = json.loads(result.stdout)["published"]
        with server.client() as client:
            assert [v.name for v in client.versions("acme/support")] == [version]
            found = client.generate("Message 1:", adapter="acme/support@canary", max_tokens=4, temperature=0.0)
            assert found.usage.completion_tokens >= 1


def test_a_push_that_fails_keeps_the_export_and_says_how_to_try_again(
    config_file: Path, base_folder: Path, tmp_path: Path
) -> None:
    """The command that is printed does work, once there is a server."""
    output = tmp_path / "my adapter"
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{closed.getsockname()[1]}"
        result = chorus(config_file, "--output", output, "--publish", nobody, "acme/support", "--alias", "canary")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "not published: UNAVAILABLE" in result.stderr
    assert (output / "task.json").is_file()
    words = shlex.split(result.stderr[result.stderr.index("chorus adapters push") :])
    assert words[words.index("--admin") + 1] == nobody
    with ServerProcess(tmp_path / "state", "--model", str(base_folder), "--dtype", "float32") as server:
        words[words.index("--admin") + 1] = server.admin
        again = CliRunner().invoke(app, words[1:])
        assert again.exit_code == 0, again.output
        with server.client() as client:
            assert set(client.get_adapter("acme/support").aliases) == {"canary"}
