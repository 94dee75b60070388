"""Runs that are cut short and go on: the same bits as if never stopped, or a refusal that says why."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from chorus.cli.main import app
from chorus.errors import FailedPrecondition, InvalidArgument
from chorus.trainer.config import TrainConfig
from chorus.trainer.interrupts import Interrupted, Stop
from chorus.trainer.loop import train
from chorus.trainer.records import Record, StepRecord

Change = Callable[..., TrainConfig]

NAMES = ("adapter_config.json", "adapter_model.safetensors", "task.json", "README.md")
#: Dropout draws from the generator; weight decay and warm-up make rate and moments matter; steps end inside an epoch.
WHOLE: dict[str, dict[str, object]] = {
    "lora": {"dropout": 0.2},
    "train": {"steps": 9, "warmup_steps": 6, "weight_decay": 0.1, "eval_every": 2, "gradient_accumulation": 2},
}


def interrupted(config: TrainConfig, output: Path, after: int, *, resume: bool = False) -> Path:
    """Runs until `after` steps were taken; returns the checkpoint."""
    stop = Stop()

    def wish(record: Record) -> None:
        if isinstance(record, StepRecord) and record.step == after:
            stop.signum = signal.SIGINT

    with pytest.raises(Interrupted) as caught:
        train(config, output, wish, resume=resume, stop=stop)
    assert caught.value.step == after
    assert not output.exists()
    return caught.value.checkpoint


def rows(output: Path) -> list[dict[str, Any]]:
    found = map(json.loads, (output / "train_log.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


def assert_same(a: Path, b: Path) -> None:
    for name in NAMES:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    assert rows(a) == rows(b)


@pytest.mark.parametrize("after", [1, 4, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_ends_with_the_same_bits(changed: Change, tmp_path: Path, after: int, dtype: str) -> None:
    config = changed(lora=WHOLE["lora"], train=WHOLE["train"] | {"dtype": dtype})
    train(config, tmp_path / "whole")
    interrupted(config, tmp_path / "parts", after)
    torch.rand(5)
    train(config, tmp_path / "parts", resume=True)
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_a_packed_run_goes_on_to_the_same_bits(changed: Change, tmp_path: Path) -> None:
    config = changed(**WHOLE, data={"packing": True, "max_length": 64})
    train(config, tmp_path / "whole")
    interrupted(config, tmp_path / "parts", 5)
    train(config, tmp_path / "parts", resume=True)
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_a_run_may_be_interrupted_again_and_again(changed: Change, tmp_path: Path) -> None:
    config = changed(**WHOLE)
    train(config, tmp_path / "whole")
    interrupted(config, tmp_path / "parts", 2)
    interrupted(config, tmp_path / "parts", 3, resume=True)
    interrupted(config, tmp_path / "parts", 7, resume=True)
    train(config, tmp_path / "parts", resume=True)
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_patience_and_the_best_adapter_survive(changed: Change, tmp_path: Path) -> None:
    """Stopped past the best step and before patience ends the run."""
    overfitting = {"steps": 60, "learning_rate": 5e-2, "warmup_steps": 0, "eval_every": 3, "patience": 2}
    config = changed(train=overfitting | {"schedule": "constant"})
    whole = train(config, tmp_path / "whole")
    assert whole.stopped_early
    interrupted(config, tmp_path / "parts", whole.best_step + 4)
    result = train(config, tmp_path / "parts", resume=True)
    assert (result.steps, result.best_step) == (whole.steps, whole.best_step)
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_a_crash_costs_the_steps_since_the_last_checkpoint(changed: Change, tmp_path: Path) -> None:
    config = changed(lora=WHOLE["lora"], train=WHOLE["train"] | {"checkpoint_every": 3})
    train(config, tmp_path / "whole")

    def crash(record: Record) -> None:
        if isinstance(record, StepRecord) and record.step == 8:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        train(config, tmp_path / "parts", crash)
    seen: list[Record] = []
    train(config, tmp_path / "parts", seen.append, resume=True)
    assert [record.step for record in seen if isinstance(record, StepRecord)] == [7, 8, 9]
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_a_complete_run_leaves_no_checkpoint(changed: Change, tmp_path: Path) -> None:
    train(changed(train={"checkpoint_every": 1}), tmp_path / "out")
    assert not list(tmp_path.glob("*.checkpoint"))
    assert not list(tmp_path.glob(".*checkpoint*"))


def test_adapter_and_optimiser_are_float32_on_a_bfloat16_base(changed: Change, tmp_path: Path) -> None:
    path = interrupted(changed(train={"dtype": "bfloat16"}), tmp_path / "out", 2)
    dtypes = {name.partition("/")[0]: tensor.dtype for name, tensor in load_file(path).items()}
    assert {dtypes[kind] for kind in ("adapter", "optimizer.exp_avg", "optimizer.exp_avg_sq")} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"train": {"learning_rate": 2e-2}}, r"train\.learning_rate \(then 0\.01, now 0\.02\)"),
        ({"train": {"steps": 7}}, r"train\.steps \(then 6, now 7\)"),
        ({"train": {"seed": 1}}, r"train\.seed"),
        ({"train": {"dtype": "bfloat16"}}, r"train\.dtype"),
        ({"lora": {"rank": 3}}, r"lora\.rank \(then 4, now 3\)"),
        ({"data": {"max_length": 30}}, r"data\.max_length"),
        ({"data": {"validation": None}}, r"data\.validation "),
    ],
)
def test_another_runs_checkpoint_is_refused(
    config: TrainConfig, changed: Change, tmp_path: Path, change: dict[str, dict[str, object]], field: str
) -> None:
    path = interrupted(config, tmp_path / "out", 2)
    before = path.read_bytes()
    with pytest.raises(FailedPrecondition, match=field) as caught:
        train(changed(**change), tmp_path / "out", resume=True)
    assert caught.value.reason == "OTHER_RUN"
    assert "\n" not in caught.value.message
    assert path.read_bytes() == before


def test_a_checkpoint_of_other_data_or_another_base_is_refused(
    config: TrainConfig, base_folder: Path, tmp_path: Path
) -> None:
    interrupted(config, tmp_path / "out", 2)
    lines = config.data.train.read_text().splitlines(keepends=True)
    config.data.train.write_text("".join([*lines[1:], lines[0]]))
    with pytest.raises(FailedPrecondition, match=r"of another run: data\.train \(then"):
        train(config, tmp_path / "out", resume=True)
    config.data.train.write_text("".join(lines))
    copy = tmp_path / "base"
    copy.mkdir()
    for file in base_folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "config.json").write_text(
        (copy / "config.json").read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05')
    )
    with pytest.raises(FailedPrecondition, match=r"of another run: base \(then"):
        train(config.model_copy(update={"base": str(copy)}), tmp_path / "out", resume=True)


def test_files_may_move_between_the_parts(config: TrainConfig, tmp_path: Path) -> None:
    train(config, tmp_path / "whole")
    interrupted(config, tmp_path / "parts", 2)
    moved = config.data.train.rename(tmp_path / "moved.jsonl")
    data = config.data.model_copy(update={"train": moved})
    train(config.model_copy(update={"data": data}), tmp_path / "parts", resume=True)
    name = "adapter_model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_resume_without_a_checkpoint_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"no checkpoint at .*out\.checkpoint; leave --resume out"):
        train(config, tmp_path / "out", resume=True)


def test_a_checkpoint_is_not_overwritten_by_a_run_that_begins(config: TrainConfig, tmp_path: Path) -> None:
    path = interrupted(config, tmp_path / "out", 2)
    before = path.read_bytes()
    with pytest.raises(InvalidArgument, match=r"out\.checkpoint is of a run that was interrupted; go on with --resume"):
        train(config, tmp_path / "out")
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"no safetensors", b"cut"])
def test_a_checkpoint_that_is_damaged_is_refused(config: TrainConfig, tmp_path: Path, content: bytes) -> None:
    path = interrupted(config, tmp_path / "out", 2)
    path.write_bytes(path.read_bytes()[:-100] if content == b"cut" else content)
    with pytest.raises(InvalidArgument, match="no checkpoint that can be read"):
        train(config, tmp_path / "out", resume=True)


def test_a_run_that_diverged_leaves_no_checkpoint(changed: Change, tmp_path: Path) -> None:
    config = changed(train={"learning_rate": 1e30, "steps": 50, "checkpoint_every": 1, "warmup_steps": 3})
    with pytest.raises(FailedPrecondition, match="diverged"):
        train(config, tmp_path / "out")
    assert not (tmp_path / "out.checkpoint").exists()


@pytest.mark.gpu
def test_a_resumed_run_ends_with_the_same_bits_on_cuda(changed: Change, tmp_path: Path) -> None:
    config = changed(lora=WHOLE["lora"], train=WHOLE["train"] | {"device": "cuda"})
    train(config, tmp_path / "whole")
    interrupted(config, tmp_path / "parts", 4)
    train(config, tmp_path / "parts", resume=True)
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_sigterm_before_the_first_step_is_one_line_and_leaves_nothing(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, at a moment that no outsider could hit: while the base is loaded."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    monkeypatch.setattr("chorus.trainer.loop.set_up", lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as caught:
        app(["train", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "out")], prog_name="chorus")
    assert caught.value.code == 143
    assert capsys.readouterr().err == "chorus: terminated\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert [entry for entry in tmp_path.iterdir() if entry.is_dir()] == []


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_with_a_checkpoint_and_one_line(
    changed: Change, tmp_path: Path, signum: signal.Signals, code: int
) -> None:
    config = changed(train={"steps": 100000})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-c", "from chorus.cli.main import main; main()", "train"]
    command += [str(tmp_path / "config.yaml"), "--output", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not any(path.stat().st_size > 2000 for path in tmp_path.glob(".out.partial-*/train_log.jsonl")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, signum)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert (stdout, stderr.count("\n")) == ("", 1)
    assert "--resume" in stderr
    path = tmp_path / "out.checkpoint"
    with safe_open(path, framework="pt") as file:
        step = json.loads(file.metadata()["chorus"])["state"]["step"]
    assert f"after step {step} of 100000" in stderr
    assert [entry for entry in tmp_path.iterdir() if entry.is_dir()] == []
    assert interrupted(config, tmp_path / "out", step + 1, resume=True) == path
