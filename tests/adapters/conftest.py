"""Tiny bases and the adapters that peft saves for them: the oracle of this room. And a registry."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from chorus.adapters.registry import Registry
from chorus.models.sites import Site
from support.registries import Clock

Export = Callable[..., tuple[Path, PeftModel]]


def make_llama(tied: bool = False) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=40,
            tie_word_embeddings=tied,
        )
    )


def make_gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=32, bos_token_id=0, eos_token_id=0)
    )


@pytest.fixture
def llama() -> PreTrainedModel:
    return make_llama()


@pytest.fixture
def tied_llama() -> PreTrainedModel:
    return make_llama(tied=True)


@pytest.fixture
def gpt2() -> PreTrainedModel:
    return make_gpt2()


@pytest.fixture(scope="session")
def sites_of() -> Callable[[PreTrainedModel], dict[str, Site]]:
    """The sites of a transformers model, found here independently of `chorus.models`."""

    def find(model: PreTrainedModel) -> dict[str, Site]:
        sites = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                conv = isinstance(module, Conv1D)
                ins, outs = module.weight.shape if conv else reversed(module.weight.shape)
                head = module is model.get_output_embeddings()
                sites[name] = Site(name, ins, outs, module.bias is not None, transposed=conv, is_lm_head=head)
            elif isinstance(module, nn.Embedding):
                sites[name] = Site(name, module.num_embeddings, module.embedding_dim, is_embedding=True)
        return sites

    return find


@pytest.fixture
def export(tmp_path: Path) -> Export:
    """Wraps a model with a random LoRA and saves it: the folder that peft wrote, and peft's own model."""
    count = 0

    def save(model: PreTrainedModel, **config: Any) -> tuple[Path, PeftModel]:
        nonlocal count
        count += 1
        folder = tmp_path / f"adapter{count}"
        save_embedding_layers = config.pop("save_embedding_layers", "auto")
        config.setdefault("init_lora_weights", False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = get_peft_model(model, LoraConfig(**config))
            wrapped.save_pretrained(str(folder), save_embedding_layers=save_embedding_layers)
        return folder, wrapped

    return save


@pytest.fixture
def gone() -> list[str]:
    """Digests whose content nobody needs any more."""
    return []


@pytest.fixture
def registry(tmp_path: Path, gone: list[str]) -> Iterator[Registry]:
    opened = Registry(tmp_path / "registry", on_unreferenced=gone.append, clock=Clock())
    yield opened
    opened.close()
