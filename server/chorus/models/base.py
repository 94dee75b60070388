"""Loads the base model through transformers and prepares it: our attention function, linears that add deltas."""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

from chorus.errors import FailedPrecondition
from chorus.models import attention
from chorus.models.angles import look_up_angles
from chorus.models.block import Block, use_blocks
from chorus.models.checkpoint import base_folder, read_config, read_module
from chorus.models.digest import base_digest
from chorus.models.digest_cache import DigestCache
from chorus.models.embedding import AdaptedEmbedding, embedding_site
from chorus.models.facts import BaseFacts
from chorus.models.families import Family, family_of
from chorus.models.linear import AdaptedLinears, wrap
from chorus.models.longrope import RowwiseLongRope, replace_longrope
from chorus.models.sites import Site
from chorus.models.tokenizer import load_tokenizer

Adapted = AdaptedLinears | AdaptedEmbedding

logger = logging.getLogger(__name__)

DUMMY_SEED = 0


@dataclass(frozen=True, slots=True)
class Base:
    """A loaded base model: transformers' module in eval mode, its adapted layers by site name, what is known of it.

    `head_sites` see the rows alone whose logits are wanted: lm_head, and where the last layer `narrows` to them, its
    linears past attention.
    """

    module: PreTrainedModel
    adapted: dict[str, Adapted]
    tokenizer: PreTrainedTokenizerFast | None
    facts: BaseFacts
    layers: int
    kv_heads: int
    head_dim: int
    head_sites: frozenset[str]
    narrows: bool
    longrope: RowwiseLongRope | None = None

    @property
    def sites(self) -> dict[str, Site]:
        return {site.name: site for site in self.facts.sites}

    def weight(self, name: str) -> torch.Tensor | None:
        """The base's own `SITE.weight` or `SITE.bias`, as the module holds it; None where there is none."""
        site, _, which = name.rpartition(".")
        layer = self.adapted.get(site)
        if layer is None or which not in ("weight", "bias"):
            return None
        if which == "weight":
            return layer.base_weight()
        bias: torch.Tensor | None = getattr(layer, "bias", None)
        return None if bias is None else bias.detach()

    @property
    def device(self) -> torch.device:
        return self.module.device

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype


def load_base(
    source: str | None, *, device: str, dtype: str, load_format: str = "auto", digests: DigestCache | None = None
) -> Base:
    """Loads a base model from a local folder or a hub id; the embedded one where `source` is None.

    `digests` remembers those of weight files.

    Weights come as safetensors only; code from the model's repository never runs.

    Raises:
        NotFound: no such folder or hub id.
        InvalidArgument: the folder does not hold a model that transformers can read.
        FailedPrecondition: a model that is not served, or a device that is not there; names it.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise FailedPrecondition("device: cuda was asked for, torch sees none", reason="NO_DEVICE")
    folder = base_folder(source)
    with ThreadPoolExecutor(1) as beside:  # the weights are hashed while they are read
        digest = beside.submit(base_digest, folder, weights=load_format != "dummy", cache=digests)
        config = read_config(folder)
        family = family_of(config)
        module = _module(folder, config, device, getattr(torch, dtype), load_format)
        name = source or "embedded"
        tokenizer = load_tokenizer(folder)
        adapted = _adapt(module, family)
        packs = module.device.type == "cpu" and module.dtype == torch.bfloat16
        if packs:
            _own_the_rest(module, adapted)
        last = use_blocks(module) if family.plain_block else None
        longrope = replace_longrope(module, config)
        look_up_angles(module, config)
        facts = BaseFacts(
            name=name,
            digest=digest.result(),
            model_type=config.model_type,
            context_length=int(config.max_position_embeddings),
            vocab_size=int(config.vocab_size),
            dtype=dtype,
            parameter_count=sum(p.numel() for p in module.parameters()),
            sites=tuple(layer.site for layer in adapted.values()),
            eos_token_ids=_eos(module, config, tokenizer),
        )
    logger.debug("the base's weights are read and hashed")
    if packs:
        _pack(module, adapted)
        logger.debug("the base's weights are packed")
    heads = int(config.num_attention_heads)
    return Base(
        module=module,
        adapted=adapted,
        tokenizer=tokenizer,
        facts=facts,
        layers=int(config.num_hidden_layers),
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        head_sites=_head_sites(adapted, last),
        narrows=last is not None,
        longrope=longrope,
    )


def _module(folder: Path, config: Any, device: str, dtype: torch.dtype, load_format: str) -> PreTrainedModel:
    if load_format == "dummy":
        torch.manual_seed(DUMMY_SEED)
        with torch.device(device):
            dummy: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.NAME)
        ready: PreTrainedModel = dummy.eval()
        return ready
    module: Any = read_module(folder, config, dtype, attention=attention.NAME)
    moved: PreTrainedModel = module.to(device)
    return moved


def _adapt(module: PreTrainedModel, family: Family) -> dict[str, Adapted]:
    """Wraps the embeddings and every linear in place; returns them by name, in the order of the modules."""
    lm_head, embedding = module.get_output_embeddings(), module.get_input_embeddings()
    adapted: dict[str, Adapted] = {}
    for name, layer in module.named_modules():
        is_adapted = layer is embedding or name.rsplit(".", 1)[-1] == family.positions
        if is_adapted and isinstance(layer, nn.Embedding):
            adapted[name] = AdaptedEmbedding(layer, embedding_site(name, layer))
        elif isinstance(layer, nn.Linear | Conv1D):
            adapted[name] = wrap(layer, _site(name, layer, family, layer is lm_head))
    for name, layer in adapted.items():
        module.set_submodule(name, layer)
    return adapted


def _head_sites(adapted: dict[str, Adapted], last: Block | None) -> frozenset[str]:
    past_attention: tuple[Adapted, ...] = last.past_attention if last is not None else ()
    return frozenset(name for name, layer in adapted.items() if layer.site.is_lm_head or layer in past_attention)


def _own_the_rest(module: PreTrainedModel, adapted: dict[str, Adapted]) -> None:
    """Copies what is not packed out of the checkpoint's mapping, before anyone else holds it.

    A tensor that is left there keeps the whole file mapped: 289 MB more resident of a checkpoint of 274.
    """
    embedding = module.get_input_embeddings().weight
    linears = [layer for layer in adapted.values() if not isinstance(layer, AdaptedEmbedding)]
    to_pack = {id(linear.weight) for linear in linears if linear.weight is not embedding}
    for parameter in module.parameters():
        if id(parameter) not in to_pack:
            parameter.data = parameter.data.clone()


def _pack(module: PreTrainedModel, adapted: dict[str, Adapted]) -> None:
    """Packs the linears' weights, one after the other, so that only one is in memory twice."""
    for block in module.modules():
        if isinstance(block, Block):
            for group in block.groups:
                group.pack()
    embedding = module.get_input_embeddings()
    for layer in adapted.values():
        if not isinstance(layer, AdaptedEmbedding) and layer.grouped_weight is None:
            layer.pack(keep_weight=layer.weight is embedding.weight)


def _site(name: str, linear: nn.Module, family: Family, is_lm_head: bool) -> Site:
    transposed = isinstance(linear, Conv1D)
    rows, columns = linear.weight.shape  # type: ignore[misc]
    leaf = name.rsplit(".", 1)[-1]
    return Site(
        name=name,
        in_features=rows if transposed else columns,
        out_features=columns if transposed else rows,
        has_bias=linear.bias is not None,
        transposed=transposed,
        is_lm_head=is_lm_head,
        shard="column" if leaf in family.column else "row" if leaf in family.row else "none",
    )


def _eos(module: PreTrainedModel, config: Any, tokenizer: PreTrainedTokenizerFast | None) -> frozenset[int]:
    """End-of-sequence ids: the generation config's, else the config's, else the tokenizer's."""
    generation: GenerationConfig | None = getattr(module, "generation_config", None)
    for owner in (generation, config, tokenizer):
        eos = getattr(owner, "eos_token_id", None)
        if eos is not None:
            ids = [eos] if isinstance(eos, int) else eos
            return frozenset(i for i in ids if 0 <= i < config.vocab_size)
    return frozenset()
