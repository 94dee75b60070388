"""What validation measures, against transformers' own greedy decoding; and which adapter it chooses."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from chorus.errors import InvalidArgument
from chorus.trainer.config import TrainConfig, load_config
from chorus.trainer.examples import Example, read_examples
from chorus.trainer.loop import train
from chorus.trainer.metrics import Validation
from chorus.trainer.selection import Selection

Change = Callable[..., TrainConfig]
Write = Callable[[str, Iterable[object]], Path]
#: Overfits at once: the validation loss falls, then rises.
OVERFITTING = {"steps": 60, "learning_rate": 5e-2, "warmup_steps": 0, "eval_every": 3, "schedule": "constant"}


def evals(output: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, (output / "train_log.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == "eval"]


def tuned(base_folder: Path, output: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32), output)


def greedy(model: Any, tokenizer: Any, prompt: str, length: int) -> list[int]:
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=length,
        do_sample=False,
        eos_token_id=0,
        pad_token_id=0,
    )
    produced: list[int] = out[0, ids.shape[1] :].tolist()
    return produced


def completion(tokenizer: Any, example: Example) -> list[int]:
    return [*tokenizer.encode(example.completion), tokenizer.eos_token_id]


def test_exact_match_is_what_greedy_decoding_gets_right(changed: Change, base_folder: Path, tmp_path: Path) -> None:
    """On training data, half memorised, so that the share is neither 0 nor 1."""
    config = changed(train={"steps": 24, "learning_rate": 3e-2, "batch_size": 8, "eval_every": 24})
    config = config.model_copy(update={"data": config.data.model_copy(update={"validation": config.data.train})})
    result = train(config, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    model = tuned(base_folder, tmp_path / "out")
    examples = [e for e in read_examples(config.data.train, "data.train") if isinstance(e, Example)]
    wanted = [(example.prompt, completion(tokenizer, example)) for example in examples]
    right = [greedy(model, tokenizer, prompt, len(ids)) == ids for prompt, ids in wanted]
    assert 0 < sum(right) < len(right)
    assert result.validation_exact_match == sum(right) / len(right)


def test_token_accuracy_counts_each_tokens_likeliest(changed: Change, base_folder: Path, tmp_path: Path) -> None:
    config = changed(train={"steps": 20, "learning_rate": 3e-2, "eval_every": 20})
    result = train(config, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    model = tuned(base_folder, tmp_path / "out")
    right = []
    assert config.data.validation is not None
    for example in read_examples(config.data.validation, "data.validation"):
        assert isinstance(example, Example)
        prompt, ids = tokenizer.encode(example.prompt), completion(tokenizer, example)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        right += (logits.argmax(-1) == torch.tensor(ids)).tolist()
    assert 0 < sum(right) < len(right)
    assert result.validation_token_accuracy == sum(right) / len(right)


def test_the_best_adapter_is_exported_and_not_the_last(changed: Change, tmp_path: Path, write_jsonl: Write) -> None:
    """Training is for another answer than validation wants: the surer of it, the worse, on any machine."""
    taught, wanted = ({"prompt": "I like", "completion": answer} for answer in (" red apples", " green plums and so"))
    data = {"train": write_jsonl("taught.jsonl", [taught] * 4), "validation": write_jsonl("wanted.jsonl", [wanted])}
    result = train(changed(train=OVERFITTING, data=data), tmp_path / "out")
    losses = {row["step"]: row["validation_loss"] for row in evals(tmp_path / "out") if row["step"]}
    assert result.validation_loss == min(losses.values())
    assert result.best_step == min(losses, key=lambda step: losses[step])
    assert result.best_step < result.steps == 60
    again = train(changed(train=OVERFITTING | {"steps": result.best_step}, data=data), tmp_path / "again")
    assert again.validation_loss == result.validation_loss
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_patience_ends_a_run_that_gets_no_better(changed: Change, tmp_path: Path) -> None:
    patient = train(changed(train=OVERFITTING), tmp_path / "all")
    result = train(changed(train=OVERFITTING | {"patience": 2}), tmp_path / "out")
    assert result.stopped_early
    assert not patient.stopped_early
    assert result.steps == result.best_step + 2 * 3
    losses = [row["validation_loss"] for row in evals(tmp_path / "out")]
    assert min(losses[-2:]) >= losses[-3]
    assert losses == [row["validation_loss"] for row in evals(tmp_path / "all")][: len(losses)]


def test_another_metric_may_choose(changed: Change, tmp_path: Path) -> None:
    result = train(changed(train=OVERFITTING | {"best_metric": "token_accuracy"}), tmp_path / "out")
    rows = [row for row in evals(tmp_path / "out") if row["step"]]
    best = max(row["validation_token_accuracy"] for row in rows)
    first = next(row for row in rows if row["validation_token_accuracy"] == best)
    assert (result.best_step, result.validation_token_accuracy) == (first["step"], best)


def test_small_gains_that_add_up_are_progress() -> None:
    """Each gain is under min_delta, two together are over it; the best follows every one of them."""
    selection = Selection("loss", patience=2, min_delta=0.15)
    for step, loss in enumerate([1.0, 0.9, 0.8, 0.7, 0.6]):
        selection.offer(step, Validation(loss, 0.0, 0.0), {})
        assert not selection.exhausted
        assert selection.best is not None
        assert selection.best.step == step
    for step, loss in enumerate([0.59, 0.58], 5):
        selection.offer(step, Validation(loss, 0.0, 0.0), {})
    assert selection.exhausted


def test_patience_without_validation_data_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("data: {train: train.jsonl}\ntrain: {patience: 2}\n")
    with pytest.raises(InvalidArgument, match=r"train\.patience needs validation data"):
        load_config(path)
