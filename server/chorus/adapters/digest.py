"""The identity of an adapter version: a SHA-256 over what the adapter computes.

    canonical JSON of {"base": base digest, "config": ..., "task": ...}, "\\n",
    then for each tensor by name: canonical JSON of [name, dtype, shape], "\\n", raw little-endian bytes

dtype and shape fix how many bytes follow, so two contents can not share one stream. What does not change an answer
(`base_model_name_or_path`, `peft_version`, `inference_mode`, dropout, metrics, the order of tensors in the file) is
left out: the same adapter pushed twice is one version. Of the task card, what serving reads counts.
"""

import ctypes
import hashlib
import sys
from functools import lru_cache
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import Any

import torch

from chorus.adapters import artifact as artifacts
from chorus.adapters.artifact import Artifact, TaskCard
from chorus.adapters.safetensors_file import DTYPE_NAMES
from chorus.adapters.strict_json import canonical
from chorus.errors import ChorusError, DataLoss

# Bytes that are hashed in one go: each time a thread lets go of the interpreter's lock, and waits for it afterwards.
_GATHERED = 1 << 18


def version_digest(artifact: Artifact, base_digest: str) -> str:
    """The version's digest on the base of this digest; both SHA-256, 64 hex digits."""
    identity = {"base": base_digest, "config": artifact.config.identity(), "task": _task_identity(artifact.task)}
    sha = hashlib.sha256(canonical(identity) + b"\n")
    pieces: list[Any] = []
    gathered = 0
    for name, tensor in sorted(artifact.tensors.items()):
        pieces += (_described(name, DTYPE_NAMES[tensor.dtype], tensor.shape), _little_endian(tensor))
        gathered += tensor.nbytes
        if gathered > _GATHERED:
            sha.update(b"".join(pieces))
            pieces, gathered = [], 0
    sha.update(b"".join(pieces))
    return sha.hexdigest()


def read_verified(folder: Path, *, digest: str, base_digest: str) -> Artifact:
    """Reads a stored version again and checks that it still is what was registered.

    Raises:
        DataLoss: a file is missing, can not be read any more, or holds something else.
    """
    try:
        artifact = artifacts.read(folder)
    except (ChorusError, OSError) as error:
        raise DataLoss(f"version {digest}: its stored files can not be read any more; push it again") from error
    if version_digest(artifact, base_digest) != digest:
        raise DataLoss(f"version {digest}: its stored bytes no longer match its digest; push it again")
    return artifact


def _task_identity(task: TaskCard | None) -> dict[str, object] | None:
    if task is None:
        return None
    read: dict[str, object] = task.model_dump(mode="json", include={"task", "labels", "prompt_template", "max_length"})
    if task.chat_template is not None:  # left out where unset: versions of before it existed keep their digests
        read["chat_template"] = task.chat_template
    return read


@lru_cache(maxsize=4096)  # adapters of one recipe have the same; asked once they fit, so names are the base's
def _described(name: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    """`canonical([name, dtype, shape])` and a newline, in a third of its time."""
    return f'[{encode_basestring_ascii(name)},"{dtype}",[{",".join(map(str, shape))}]]\n'.encode("ascii")


def _little_endian(tensor: torch.Tensor) -> Any:
    """The tensor's bytes as a buffer, which lives as long as the tensor; a copy only where it has to be."""
    if not tensor.is_contiguous() or sys.byteorder == "big":
        data = tensor.contiguous().view(-1).view(torch.uint8)
        if sys.byteorder == "big":
            data = data.view(-1, tensor.element_size()).flip(1).contiguous().view(-1)
        return data.numpy()
    return (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
