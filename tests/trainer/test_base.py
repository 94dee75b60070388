"""The base: where it comes from, what it is called, which token ends a completion."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch

from chorus.errors import FailedPrecondition, NotFound
from chorus.models import embedded
from chorus.models.digest import base_digest
from chorus.trainer.base import load_base

CPU = torch.device("cpu")


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def folder(base_folder: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(base_folder, tmp_path / "base"))


def test_the_embedded_base_is_the_default() -> None:
    base = load_base(None, CPU, torch.float32)
    assert base.name == "embedded"
    assert base.digest == base_digest(embedded.path())
    assert not any(parameter.requires_grad for parameter in base.module.parameters())


def test_a_hub_id_is_downloaded_and_kept_as_the_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repo_id: str, allow_patterns: list[str]) -> str:
        asked.append(repo_id)
        assert not any(pattern.endswith((".bin", ".py")) for pattern in allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_base("org/name", CPU, torch.float32).name == "org/name"
    assert asked == ["org/name"]


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo_id: str, allow_patterns: list[str]) -> str:
        raise ConnectionError("a long story\nof many lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    remedy = "give a folder's path, or a hub id that this machine can reach"
    with pytest.raises(NotFound, match=rf"'org/name' is no local folder.*ConnectionError; {remedy}$"):
        load_base("org/name", CPU, torch.float32)


@pytest.mark.parametrize(("stops", "want"), [(0, 0), ([5, 0], 0), ([6, 5], 6), (None, 0)])
def test_completions_end_where_serving_stops(folder: Path, stops: object, want: int) -> None:
    """The tokenizer's EOS, 0, is preferred among the tokens that serving stops at."""
    edit(folder / "generation_config.json", eos_token_id=stops)
    edit(folder / "config.json", eos_token_id=None)
    assert load_base(str(folder), CPU, torch.float32).eos == want


def test_a_base_without_an_end_token_is_refused(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=None)
    edit(folder / "config.json", eos_token_id=None)
    edit(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(FailedPrecondition, match="end-of-sequence token"):
        load_base(str(folder), CPU, torch.float32)
