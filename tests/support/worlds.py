"""A tiny base with adapters, and folders of files that look like adapters and are not."""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from support.tiny import save_adapter, save_base

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PROMPT = [7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47]


class TinyWorld:
    """A tiny llama and LoRA adapters of it, each made once; `folder` holds them all."""

    def __init__(self, folder: Path) -> None:
        # The server under test needs a core too.
        self.folder = folder
        self.base = save_base(folder / "base", "llama")
        self._made: dict[str, Path] = {}

    def adapter(self, name: str, **config: Any) -> Path:
        """The adapter of this name; its weights depend on the name alone."""
        if name not in self._made:
            seed = sum(name.encode()) * 31 + len(name)
            self._made[name] = save_adapter(self.base, self.folder / name, seed, **{"r": 8, **config})
        return self._made[name]

    def copy(self, source: Path, name: str) -> Path:
        """A copy of an adapter's folder, to be spoiled."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return Path(shutil.copytree(source, self.folder / name))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / TENSORS)


def write_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSORS)


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def fill(folder: Path, value: float, *, only: str = "") -> None:
    """Sets every factor of the modules whose names hold `only` to `value`."""
    tensors = tensors_of(folder)
    for name, tensor in tensors.items():
        if only in name:
            tensors[name] = torch.full_like(tensor, value)
    write_tensors(folder, tensors)


def listing(folder: Path) -> dict[str, int]:
    """Every path under a folder, with the sizes of its files. What is removed meanwhile is not there."""
    paths = sorted(Path(at, name) for at, folders, files in os.walk(folder) for name in (*folders, *files))
    found = {}
    for path in paths:
        with suppress(FileNotFoundError):
            status = path.lstat()
            found[str(path.relative_to(folder))] = status.st_size if S_ISREG(status.st_mode) else -1
    return found
