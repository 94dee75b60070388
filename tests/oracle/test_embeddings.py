"""Which embeddings adapters change: all of every family, but for one with which PEFT itself can do nothing."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from chorus.adapters import artifact as artifacts
from chorus.adapters.kinds import Lowering
from chorus.errors import FailedPrecondition
from chorus.models.base import load_base
from support.tiny import FAMILIES, save_adapter, save_base, solo


@pytest.mark.parametrize("family", FAMILIES)
def test_every_embedding_is_adapted_but_for_opts_positions(family: str, tmp_path: Path) -> None:
    base = save_base(tmp_path, family)
    embeddings = {name for name, layer in solo(base, None).named_modules() if isinstance(layer, nn.Embedding)}
    sites = load_base(str(base), device="cpu", dtype="float32").sites.values()
    adapted = {site.name for site in sites if site.is_embedding}
    assert embeddings - adapted == ({"model.decoder.embed_positions"} if family == "opt" else set())


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base, and what PEFT saves of its positions."""
    folder = tmp_path_factory.mktemp("opt")
    base = save_base(folder / "base", "opt")
    return base, save_adapter(base, folder / "adapter", 1, r=2, target_modules=["embed_positions"])


def test_peft_can_not_generate_with_an_adapter_of_opts_positions(opt: tuple[Path, Path]) -> None:
    """It looks up the first argument of the module it wraps: a mask here, of floats where nothing is padded."""
    prompt = torch.tensor([[5, 6, 7, 8]])
    with pytest.raises(RuntimeError, match="argument #1 'indices'"):
        solo(*opt).generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=2)  # type: ignore[operator]


@torch.no_grad()
def test_peft_merges_something_else_than_it_computes_of_opts_positions(opt: tuple[Path, Path]) -> None:
    prompt = torch.tensor([[5, 6, 7, 8]])
    computed = solo(*opt)(input_ids=prompt, attention_mask=torch.ones_like(prompt)).logits
    merged = copy.deepcopy(solo(*opt)).merge_and_unload()(input_ids=prompt).logits  # type: ignore[operator]
    assert (computed - merged).abs().max() > 0.1


def test_an_adapter_of_opts_positions_is_refused_by_name(opt: tuple[Path, Path]) -> None:
    sites = load_base(str(opt[0]), device="cpu", dtype="float32").sites
    with pytest.raises(FailedPrecondition, match=r"decoder\.embed_positions.*PEFT looks up the attention mask there"):
        Lowering(sites, max_rank=8).fit(artifacts.read(opt[1]))
