"""A base model's folder: where it is, its config, its weights whole. What the server and the trainer both read.

Local folder or hub id, safetensors only; code of a model's repository never runs. Knows nothing of adapters or serving.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig
from transformers.utils.logging import disable_progress_bar

from chorus.errors import InvalidArgument, NotFound
from chorus.models import embedded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja"]


def base_folder(source: str | None) -> Path:
    """The folder of a local path or hub id; the embedded base's where `source` is None.

    Raises:
        NotFound: neither a folder nor on the hub.
    """
    if source is None:
        return embedded.path()
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or source.startswith((".", "~")):
        raise NotFound(f"base model: no folder {source}", reason="MODEL_NOT_FOUND")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise NotFound(
            f"base model: {source!r} is no local folder, and the hub did not give it: {type(error).__name__}; give a "
            "folder's path, or a hub id that this machine can reach",
            reason="MODEL_NOT_FOUND",
        ) from error


def read_config(folder: Path) -> Any:
    """The transformers config of a folder.

    Raises:
        InvalidArgument: there is none, or it can not be read.
    """
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        hint = "; it is an adapter: serve its base, and push it with `chorus adapters push`" if adapter else ""
        raise InvalidArgument(f"base model: {folder} holds no config.json{hint}", reason="BAD_MODEL")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise InvalidArgument(
            f"base model: config.json of {folder} can not be read: {_first_line(error)}", reason="BAD_MODEL"
        ) from error


def read_module(folder: Path, config: Any, dtype: torch.dtype, *, attention: str | None = None) -> "PreTrainedModel":
    """The causal decoder of a folder on the CPU, in eval mode; `attention` as transformers names implementations.

    Raises:
        InvalidArgument: no safetensors, unreadable ones, or weights that do not fit the config.
    """
    if not any(folder.glob("*.safetensors")):
        raise InvalidArgument(
            f"base model: {folder} holds no *.safetensors; other weight formats are not read", reason="BAD_MODEL"
        )
    from transformers import AutoModelForCausalLM  # brings torch's compiler: 100 MB that a front end does without

    disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise InvalidArgument(
            f"base model: {folder} can not be read: {_first_line(error)}", reason="BAD_MODEL"
        ) from error
    _check_complete(folder, loaded[1])
    module: PreTrainedModel = loaded[0].eval()
    return module


def _check_complete(folder: Path, report: dict[str, Any]) -> None:
    """Refuses what transformers only warns of: tensors that the files lack or hold in another shape, then random."""
    for what in ("missing_keys", "mismatched_keys"):
        if wrong := sorted(str(key) for key in report.get(what, ())):
            raise InvalidArgument(
                f"base model: the weights of {folder} do not fit its config.json: {len(wrong)} "
                f"{what.replace('_', ' ')}, the first is {wrong[0]}",
                reason="BAD_MODEL",
            )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
