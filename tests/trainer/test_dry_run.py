"""`--dry-run` tells what a run would do, and does nothing."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from chorus.cli.main import app
from chorus.trainer.config import TrainConfig
from chorus.trainer.dry_run import dry_run
from chorus.trainer.loop import train


def test_it_counts_what_a_run_would_learn(config: TrainConfig, tmp_path: Path) -> None:
    plan, result = dry_run(config), train(config, tmp_path / "out")
    assert plan.trainable_parameters == result.trainable_parameters
    assert plan.base_parameters == result.base_parameters
    assert plan.steps == result.steps
    assert plan.data == result.data


def test_its_memory_is_exact_but_for_activations(config: TrainConfig) -> None:
    """Rank r on all linears of the tiny Llama, counted by hand; tied embeddings count once."""
    plan = dry_run(config)
    rank, hidden, ffn, kv = config.lora.rank, 32, 64, 16
    attention = [(hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden)]
    linears = [*attention, (hidden, ffn), (hidden, ffn), (ffn, hidden)]
    adapter = 2 * sum(rank * (k + n) for k, n in linears)
    base = 320 * hidden + 2 * (sum(k * n for k, n in linears) + 2 * hidden) + hidden
    assert plan.trainable_parameters == adapter
    assert plan.base_parameters == base
    memory = plan.memory
    assert (memory.weights, memory.adapter, memory.gradients) == (base * 4, adapter * 4, adapter * 4)
    assert memory.optimizer == adapter * 8
    assert memory.activations > 0


def test_samples_mark_what_is_learned(config: TrainConfig) -> None:
    samples = dry_run(config).samples
    assert len(samples) == 3
    for sample in samples:
        prompt, completion = sample
        assert (prompt.learned, completion.learned) == (False, True)
        assert prompt.text.endswith("Reply:")
        assert completion.text.endswith("<eos>")


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_prints_it_and_writes_nothing(config: TrainConfig, tmp_path: Path, as_json: bool) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    before = sorted(tmp_path.rglob("*"))
    done = CliRunner().invoke(app, ["train", str(path), "--dry-run", *(["--json"] if as_json else [])])
    assert done.exit_code == 0, done.output
    assert sorted(tmp_path.rglob("*")) == before
    if as_json:
        assert json.loads(done.stdout)["memory"]["optimizer"] == dry_run(config).memory.optimizer
    else:
        for said in ("trainable parameters", "memory in all", "tokens an epoch", "[[", "<eos>]]"):
            assert said in done.stdout


def test_without_output_only_a_dry_run_runs(config: TrainConfig, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    done = CliRunner().invoke(app, ["train", str(path)])
    assert done.exit_code == 2
    assert "--output" in done.stderr
