"""The frozen base as the trainer sees it: transformers' own module, untouched by the server's hooks.

Knows folders, hub ids and what makes a base trainable here. Does not know adapters.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from chorus.errors import FailedPrecondition, InvalidArgument, NotFound
from chorus.models import embedded
from chorus.models.digest import base_digest, tokenizer_digest

EMBEDDED = "embedded"
_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja"]


@dataclass(frozen=True, slots=True)
class Base:
    """A loaded base. `name` is safe to publish: a hub id or a folder's name, never a private path.

    `eos` ends every completion, `pad` fills batches (any id will do: see `batches`), `context` is in tokens.
    """

    name: str
    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    digest: str
    tokenizer_digest: str | None
    context: int | None
    eos: int
    pad: int


def load_base(source: str | None, device: torch.device, dtype: torch.dtype) -> Base:
    """Loads model and tokenizer from a folder or a hub id; the embedded base where `source` is None.

    Raises:
        NotFound: neither a folder nor on the hub.
        InvalidArgument: not a model that transformers can read from safetensors, or a weight is missing.
        FailedPrecondition: no causal decoder, no tokenizer, no end-of-sequence token.
    """
    folder = embedded.path() if source is None else _folder(source)
    config = _config(folder)
    tokenizer = _tokenizer(folder)
    module = _module(folder, dtype)
    nn.Module.to(module, device).requires_grad_(False)
    eos = _eos(module, tokenizer)
    return Base(
        name=_public_name(source, folder),
        module=module,
        tokenizer=tokenizer,
        digest=base_digest(folder),
        tokenizer_digest=tokenizer_digest(folder),
        context=getattr(config.get_text_config(), "max_position_embeddings", None),
        eos=eos,
        pad=eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )


def _public_name(source: str | None, folder: Path) -> str:
    if source is None:
        return EMBEDDED
    return folder.resolve().name if Path(source).expanduser().is_dir() else source


def _folder(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or source.startswith((".", "~")):
        raise NotFound(f"base: no folder {source}", reason="MODEL_NOT_FOUND", field="base")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=_FILES))
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise NotFound(
            f"base: {source!r} is no local folder, and the hub did not give it: {type(error).__name__}",
            reason="MODEL_NOT_FOUND",
            field="base",
        ) from error


def _config(folder: Path) -> Any:
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise InvalidArgument(f"base: {folder} must hold config.json and *.safetensors", reason="BAD_MODEL")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise InvalidArgument(f"base: config.json can not be read: {_first_line(error)}", reason="BAD_MODEL") from error
    decoders = {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)}
    if not decoders & set(config.architectures or ()):
        raise FailedPrecondition(
            f"base: {folder.name} is {config.architectures}, only causal decoders are trained here",
            reason="UNSUPPORTED_MODEL",
            field="base",
        )
    return config


def _module(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    try:
        with _no_progress_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except (ValueError, RuntimeError, OSError) as error:
        raise InvalidArgument(f"base: {folder} can not be read: {_first_line(error)}", reason="BAD_MODEL") from error
    module: PreTrainedModel = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):
        raise InvalidArgument(f"base: {folder} has no weight {missing[0]!r}", reason="BAD_MODEL", field="base")
    return module


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


def _eos(module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's EOS where serving stops at it (by generation config, else config), else serving's first."""
    for owner in (module.generation_config, module.config):
        eos = getattr(owner, "eos_token_id", None)
        if eos is not None:
            stops: list[int] = [eos] if isinstance(eos, int) else list(eos)
            return tokenizer.eos_token_id if tokenizer.eos_token_id in stops else stops[0]
    if tokenizer.eos_token_id is None:
        raise FailedPrecondition(
            "base: neither model nor tokenizer names an end-of-sequence token; completions could never end",
            reason="NO_EOS",
            field="base",
        )
    return int(tokenizer.eos_token_id)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
