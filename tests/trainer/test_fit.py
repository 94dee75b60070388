"""The steps, against transformers' own loss and against arithmetic by hand."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from chorus.errors import FailedPrecondition
from chorus.trainer.batches import collate
from chorus.trainer.config import TrainConfig
from chorus.trainer.encoded import Encoded
from chorus.trainer.examples import Example, read_examples
from chorus.trainer.loop import train
from chorus.trainer.metrics import completion_loss
from chorus.trainer.records import EvalRecord, Record, StepRecord

Change = Callable[..., TrainConfig]

EXAMPLES = [
    Encoded((5, 6, 7, 8, 0), (3, 4)),
    Encoded((9, 10, 0), (1, 2)),
    Encoded((11, 12, 13, 14, 15, 16, 0), (6,)),
]


@pytest.fixture(scope="module")
def base(base_folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    return model


def log_of(output: Path, kind: str) -> list[dict[str, Any]]:
    rows = map(json.loads, (output / "train_log.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == kind]


def weights_of(output: Path) -> dict[str, Tensor]:
    return load_file(output / "adapter_model.safetensors")


def solo_loss(model: Any, ids: list[int], prompt_length: int) -> float:
    """Sum over the completion's tokens, by transformers' own loss, without batch or padding."""
    labels = torch.tensor([[-100] * prompt_length + ids[prompt_length:]])
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([ids]), labels=labels).loss) * (len(ids) - prompt_length)


def mean_loss_over_file(model: Any, folder: Path, path: Path) -> float:
    """Mean per target token over a JSONL file, example by example."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for example in read_examples(path, "data.validation"):
        assert isinstance(example, Example)
        prompt, completion = tokenizer.encode(example.prompt), tokenizer.encode(example.completion)
        total += solo_loss(model, [*prompt, *completion, tokenizer.eos_token_id], len(prompt))
        count += len(completion) + 1
    return total / count


def test_loss_equals_transformers_own_on_each_row_alone(base: PreTrainedModel) -> None:
    want = sum(solo_loss(base, list(example.ids), example.targets[0]) for example in EXAMPLES)
    with torch.no_grad():
        got = float(completion_loss(base, collate(EXAMPLES, pad=3)))
    assert got == pytest.approx(want, rel=1e-5)


def test_prompt_tokens_are_no_targets(base: PreTrainedModel) -> None:
    """By hand: only the terms of completion tokens are in the sum."""
    example = EXAMPLES[0]
    with torch.no_grad():
        log_p = base(input_ids=torch.tensor([example.ids])).logits[0].double().log_softmax(-1)
        got = float(completion_loss(base, collate([example], pad=0)))
    terms = [-float(log_p[i - 1, example.ids[i]]) for i in range(1, len(example.ids))]
    assert got == pytest.approx(sum(terms[example.targets[0] - 1 :]), rel=1e-5)
    assert got != pytest.approx(sum(terms), rel=1e-2)


def test_a_memorisable_set_is_memorised(changed: Change, tmp_path: Path) -> None:
    config = changed(train={"steps": 60, "learning_rate": 3e-2, "batch_size": 8}, lora={"rank": 8, "alpha": 16})
    result = train(config, tmp_path / "out")
    first = log_of(tmp_path / "out", "step")[0]["loss"]
    assert result.train_loss < 0.1 * first


def test_logged_validation_losses_equal_an_independent_computation(
    config: TrainConfig, base_folder: Path, tmp_path: Path
) -> None:
    result = train(config, tmp_path / "out")
    assert config.data.validation is not None
    fresh = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    before = mean_loss_over_file(fresh, base_folder, config.data.validation)
    tuned = PeftModel.from_pretrained(fresh, tmp_path / "out")
    after = mean_loss_over_file(tuned, base_folder, config.data.validation)
    rows = log_of(tmp_path / "out", "eval")
    assert [row["step"] for row in rows] == [0, 4, 6]
    assert rows[0]["validation_loss"] == pytest.approx(before, rel=1e-5)
    assert rows[-1]["validation_loss"] == pytest.approx(after, rel=1e-5)
    assert (result.validation_loss_before, result.validation_loss) == (
        rows[0]["validation_loss"],
        rows[-1]["validation_loss"],
    )
    assert abs(before - after) > 0.1


def test_accumulated_batches_make_the_step_of_one_big_batch(changed: Change, tmp_path: Path) -> None:
    """16 examples a step each time. Batches are sorted by length, so their counts of targets differ: weighing batches
    alike, and not tokens, gives another loss; AdamW's first step shows the sign of each gradient only, hence two."""
    whole = changed(train={"steps": 2, "batch_size": 16, "warmup_steps": 0})
    parts = changed(train={"steps": 2, "batch_size": 4, "gradient_accumulation": 4, "warmup_steps": 0})
    train(whole, tmp_path / "whole")
    train(parts, tmp_path / "parts")
    for big, small in zip(log_of(tmp_path / "whole", "step"), log_of(tmp_path / "parts", "step"), strict=True):
        assert small["loss"] == pytest.approx(big["loss"], rel=1e-5)
        assert small["grad_norm"] == pytest.approx(big["grad_norm"], rel=1e-4)
        assert small["tokens"] == big["tokens"]
    want = weights_of(tmp_path / "whole")
    for name, tensor in weights_of(tmp_path / "parts").items():
        torch.testing.assert_close(tensor, want[name], rtol=1e-3, atol=1e-5)


def test_the_gradients_norm_is_logged_before_clipping(changed: Change, tmp_path: Path) -> None:
    train(changed(train={"steps": 1, "max_grad_norm": 1e-3}), tmp_path / "clipped")
    train(changed(train={"steps": 1, "max_grad_norm": 1e3}), tmp_path / "free")
    norms = [log_of(tmp_path / name, "step")[0]["grad_norm"] for name in ("clipped", "free")]
    assert norms[0] == norms[1] > 1e-2


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_rate_warms_up_and_decays(changed: Change, tmp_path: Path, schedule: str) -> None:
    config = changed(train={"steps": 12, "warmup_steps": 4, "learning_rate": 0.01, "schedule": schedule})
    train(config, tmp_path / "out")
    rates = [row["lr"] for row in log_of(tmp_path / "out", "step")]
    done = [step / 8 for step in range(8)]
    decay = {
        "cosine": [0.5 * (1 + math.cos(math.pi * x)) for x in done],
        "linear": [1 - x for x in done],
        "constant": [1.0] * 8,
    }[schedule]
    assert rates == pytest.approx([0.01 * x for x in [0, 0.25, 0.5, 0.75, *decay]])


def test_epochs_set_the_number_of_steps(changed: Change, tmp_path: Path) -> None:
    result = train(changed(train={"steps": None, "epochs": 2, "batch_size": 5}), tmp_path / "out")
    assert result.steps == 8
    assert len(log_of(tmp_path / "out", "step")) == 8


def test_gradients_are_clipped(changed: Change, tmp_path: Path) -> None:
    """AdamW shrugs off a smaller scale, until gradients vanish beside its epsilon."""
    train(changed(train={"max_grad_norm": 1e-14}), tmp_path / "clipped")
    train(changed(), tmp_path / "free")
    moved = {
        name: max(float(t.abs().max()) for key, t in weights_of(tmp_path / name).items() if "lora_B" in key)
        for name in ("clipped", "free")
    }
    assert moved["clipped"] < 1e-5
    assert moved["free"] > 1e-2


def test_epochs_count_examples_whatever_a_step_takes(changed: Change, tmp_path: Path) -> None:
    """Two passes over 16 examples, 4 batches each, 3 of them to a step: 8 / 3, rounded up."""
    config = changed(train={"steps": None, "epochs": 2, "batch_size": 4, "gradient_accumulation": 3})
    assert train(config, tmp_path / "out").steps == 3


def test_weight_decay_shrinks_weights(changed: Change, tmp_path: Path) -> None:
    norms = {}
    for decay in (0.0, 10.0):
        train(changed(train={"weight_decay": decay}), tmp_path / f"out-{decay}")
        tensors = weights_of(tmp_path / f"out-{decay}")
        norms[decay] = sum(float(tensor.norm()) for name, tensor in tensors.items() if "lora_A" in name)
    assert norms[10.0] < 0.9 * norms[0.0]


def test_the_caller_sees_every_record(config: TrainConfig, tmp_path: Path) -> None:
    seen: list[Record] = []
    train(config, tmp_path / "out", seen.append)
    assert [record.step for record in seen if isinstance(record, StepRecord)] == [1, 2, 3, 4, 5, 6]
    assert [record.step for record in seen if isinstance(record, EvalRecord)] == [0, 4, 6]
    assert all(record.steps == 6 for record in seen)
    assert [r["tokens"] for r in log_of(tmp_path / "out", "step")] == [
        r.tokens for r in seen if isinstance(r, StepRecord)
    ]


def test_a_run_without_validation_data_has_no_validation_loss(changed: Change, tmp_path: Path) -> None:
    result = train(changed(data={"validation": None}), tmp_path / "out")
    assert result.validation_loss_before is None
    assert result.validation_loss is None
    assert log_of(tmp_path / "out", "eval") == []


def test_a_loss_that_is_not_finite_stops_the_run(changed: Change, tmp_path: Path) -> None:
    config = changed(train={"learning_rate": 1e30, "steps": 50})
    with pytest.raises(FailedPrecondition, match=r"diverged at step \d+: .*learning_rate") as caught:
        train(config, tmp_path / "out")
    assert caught.value.reason == "DIVERGED"
    assert "\n" not in caught.value.message
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
