"""The export's README: its facts are the run's, its code runs, and it tells no path."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from chorus.models.digest import base_digest, tokenizer_digest
from chorus.trainer.config import TrainConfig
from chorus.trainer.loop import train

Change = Callable[..., TrainConfig]


def test_the_card_tells_what_was_trained_on_what_and_how_well(
    changed: Change, base_folder: Path, tmp_path: Path
) -> None:
    config = changed(task={"name": "colours"})
    result = train(config, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert base_digest(base_folder) in card
    assert str(tokenizer_digest(base_folder)) in card
    assert hashlib.sha256(config.data.train.read_bytes()).hexdigest() in card
    assert "# LoRA adapter: colours" in card
    assert f"| loss per token | {result.validation_loss_before:.4f} | {result.validation_loss:.4f} |" in card
    assert "16 examples were learned, 5 were held out" in card
    assert str(tmp_path) not in card
    assert str(base_folder.parent) not in card


def test_its_config_trains_the_same_adapter(config: TrainConfig, base_folder: Path, tmp_path: Path) -> None:
    """With the names of base and files, which is all it tells, put back where they lie."""
    train(config, tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    found = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert found is not None
    values = yaml.safe_load(found[1])
    assert values["base"] == base_folder.name
    values["base"] = str(base_folder)
    values["data"] |= {name: str(tmp_path / values["data"][name]) for name in ("train", "validation")}
    train(TrainConfig.model_validate(values), tmp_path / "again")
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_its_python_loads_the_adapter(changed: Change, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = changed(train={"steps": 1, "warmup_steps": 0}, data={"validation": None})
    train(config.model_copy(update={"base": None}), tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    assert "chorus serve\n" in text
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path / "out")
    exec(found[1], names)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        tuned = names["model"](input_ids=ids).logits
        with names["model"].disable_adapter():
            base = names["model"](input_ids=ids).logits
    assert base.shape[-1] == names["base"].config.vocab_size
    assert not torch.equal(tuned, base)


def test_a_run_without_held_out_data_claims_nothing_of_it(changed: Change, tmp_path: Path) -> None:
    train(changed(train={"steps": 1}, data={"validation": None}), tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "nothing was measured on unseen data" in card
    assert "| loss per token |" not in card


def test_text_of_the_owner_can_not_break_out_of_its_block(changed: Change, tmp_path: Path) -> None:
    template = "```\n# Not a heading {text}\n````"
    train(changed(train={"steps": 1}, task={"name": "a `b`\nc", "prompt_template": template}), tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "# LoRA adapter: a 'b' c\n" in card
    found = re.search(r"^(`{5,})yaml\n(.*?)^\1$", card, re.DOTALL | re.MULTILINE)
    assert found is not None
    assert yaml.safe_load(found[2])["task"]["prompt_template"] == template
