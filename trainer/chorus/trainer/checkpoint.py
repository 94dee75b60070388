"""A run's checkpoint: one safetensors file beside the output, `OUTPUT.checkpoint`, replaced as a whole.

    header    JSON: format_version, identity (what the run is), state (where it stands)
    tensors   see `snapshot`; and `log`, the bytes of train_log.jsonl so far

No pickle: reading one runs nothing. `identity` is what must be the same for the rest of the run to be the same run:
the config without paths, the digests of base, tokenizer and data, and the device's type.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from chorus.errors import FailedPrecondition, InvalidArgument
from chorus.trainer.base import Base
from chorus.trainer.config import TrainConfig
from chorus.trainer.data import Dataset
from chorus.trainer.encoded import Encoded
from chorus.trainer.snapshot import Snapshot

FORMAT_VERSION: Final = 1
# Where files lie, and what changes no weight.
_FREE: Final = frozenset({"base", "data.train", "data.validation", "train.checkpoint_every", "train.device"})


class Resumed(NamedTuple):
    """Where an interrupted run stood, and the bytes of its log."""

    snapshot: Snapshot
    log: bytes


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoint of one run: at `path`, of the run that is `what`; read if `resume`."""

    path: Path
    what: dict[str, Any]
    resume: bool

    def resumed(self) -> Resumed | None:
        """What the run goes on from; None for one that begins. Raises as `read_checkpoint` does."""
        if not self.resume:
            return None
        state, tensors = read_checkpoint(self.path, self.what)
        log = bytes(tensors.pop("log").tolist())
        return Resumed(Snapshot(state, tensors), log)

    def write(self, snapshot: Snapshot, log: bytes) -> None:
        """Replaces the checkpoint."""
        told = torch.frombuffer(bytearray(log), dtype=torch.uint8)
        write_checkpoint(self.path, self.what, Snapshot(snapshot.state, {**snapshot.tensors, "log": told}))


def checkpoint_path(output: Path) -> Path:
    """Where the checkpoint of a run to `output` lies."""
    return output.parent / f"{output.name}.checkpoint"


def identity(config: TrainConfig, base: Base, data: Dataset, device: torch.device) -> dict[str, Any]:
    """What the run is, by the config's keys; all of it JSON."""
    settings = _flat(config.model_dump(mode="json"))
    return {key: value for key, value in settings.items() if key not in _FREE} | {
        "base": base.digest,
        "tokenizer": base.tokenizer_digest,
        "data.train": _examples_digest(data.train),
        "data.validation": _examples_digest(data.validation),
        "train.device": device.type,
    }


def write_checkpoint(path: Path, what: dict[str, Any], snapshot: Snapshot) -> None:
    """Replaces the checkpoint at `path`; at every moment the file is whole, the old one or the new one."""
    header = {"format_version": FORMAT_VERSION, "identity": what, "state": snapshot.state}
    content = save(snapshot.tensors, metadata={"chorus": json.dumps(header, allow_nan=False)})
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_checkpoint(path: Path, what: dict[str, Any]) -> Snapshot:
    """Reads the checkpoint of the run that is `what`.

    Raises:
        InvalidArgument: it can not be read.
        FailedPrecondition: it is another run's; names every field that differs.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["chorus"])
            version, was, state = (header[key] for key in ("format_version", "identity", "state"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise InvalidArgument(
            f"resume: {path} is no checkpoint that can be read ({type(error).__name__}); remove it and begin anew",
            reason="BAD_CHECKPOINT",
            field="resume",
        ) from None
    if version != FORMAT_VERSION:
        raise FailedPrecondition(
            f"resume: {path} has format_version {version}, this trainer reads {FORMAT_VERSION}; "
            "go on with the version that wrote it, or remove it and begin anew",
            reason="OTHER_RUN",
            field="resume",
        )
    _check_same(path, was, what)
    return Snapshot(state, tensors)


def _check_same(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    keys = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    if keys:
        differences = ", ".join(f"{key} (then {found.get(key)!r}, now {wanted.get(key)!r})" for key in keys)
        raise FailedPrecondition(
            f"resume: {path} is of another run: {differences}; "
            "go on with the same config, base and data, or remove it and begin anew",
            reason="OTHER_RUN",
            field=keys[0],
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _examples_digest(examples: Sequence[Encoded]) -> str:
    """SHA-256 (hex) of the examples as they are learned: ids and targets, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr(example).encode())
    return digest.hexdigest()
