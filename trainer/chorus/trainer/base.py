"""The frozen base as the trainer sees it: transformers' own module, untouched by the server's hooks.

Knows folders, hub ids and what makes a base trainable here. Does not know adapters.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from chorus.errors import FailedPrecondition
from chorus.models.checkpoint import base_folder, read_config, read_module
from chorus.models.digest import base_digest, tokenizer_digest

EMBEDDED = "embedded"


@dataclass(frozen=True, slots=True)
class Base:
    """A loaded base. `name` is safe to publish: a hub id or a folder's name, never a private path.

    `eos` ends every completion, serving ends answers at any of `stops`, `pad` fills batches (any id will do: see
    `batches`), `context` is in tokens.
    """

    name: str
    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    digest: str
    tokenizer_digest: str | None
    context: int | None
    eos: int
    stops: frozenset[int]
    pad: int


def load_base(source: str | None, device: torch.device, dtype: torch.dtype) -> Base:
    """Loads model and tokenizer from a folder or a hub id; the embedded base where `source` is None.

    Raises:
        NotFound: neither a folder nor on the hub.
        InvalidArgument: not a model that transformers can read from safetensors, or a weight is missing.
        FailedPrecondition: no causal decoder, no tokenizer, no end-of-sequence token.
    """
    folder = base_folder(source)
    config = read_config(folder)
    _check_decoder(folder, config)
    tokenizer = _tokenizer(folder)
    module = read_module(folder, config, dtype)
    nn.Module.to(module, device).requires_grad_(False)
    stops = _stops(module, tokenizer)
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id in stops else stops[0]
    return Base(
        name=_public_name(source, folder),
        module=module,
        tokenizer=tokenizer,
        digest=base_digest(folder),
        tokenizer_digest=tokenizer_digest(folder),
        context=getattr(config.get_text_config(), "max_position_embeddings", None),
        eos=eos,
        stops=frozenset(stops),
        pad=eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )


def _public_name(source: str | None, folder: Path) -> str:
    if source is None:
        return EMBEDDED
    return folder.resolve().name if Path(source).expanduser().is_dir() else source


def _check_decoder(folder: Path, config: Any) -> None:
    decoders = {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)}
    if not decoders & set(config.architectures or ()):
        raise FailedPrecondition(
            f"base: {folder.name} is {config.architectures}, only causal decoders are trained here",
            reason="UNSUPPORTED_MODEL",
            field="base",
        )


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except (ValueError, KeyError, OSError) as error:
        raise FailedPrecondition(
            f"base: {folder} has no tokenizer that can be read: {_first_line(error)}", reason="BAD_TOKENIZER"
        ) from error
    return tokenizer


def _stops(module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Where serving ends an answer: by generation config, else config; else the tokenizer's EOS."""
    for owner in (module.generation_config, module.config):
        eos = getattr(owner, "eos_token_id", None)
        if eos is not None:
            return [eos] if isinstance(eos, int) else list(eos)
    if tokenizer.eos_token_id is None:
        raise FailedPrecondition(
            "base: neither model nor tokenizer names an end-of-sequence token; completions could never end",
            reason="NO_EOS",
            field="base",
        )
    return [int(tokenizer.eos_token_id)]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
