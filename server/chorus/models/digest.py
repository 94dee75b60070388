"""The base model's identity: SHA-256 over its canonical config and the SHA-256 of each weight file.

And the tokenizer's, so that an adapter can say which one it was trained with.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from chorus.models.digest_cache import DigestCache

# Say where and by what a config was written, not what the model computes. Weights' own dtype is in their files.
_IRRELEVANT = frozenset({"_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "use_cache"})
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json")


def base_digest(folder: Path, *, weights: bool = True, cache: DigestCache | None = None) -> str:
    """Digest, hex, of the base model in a folder: `config.json` and every `*.safetensors` file's bytes.

    Without `weights` (`--load-format dummy` does not read them) it is the digest of the config alone.
    A `cache` spares files that have not changed since the hashing.
    """
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    relevant = {key: value for key, value in config.items() if key not in _IRRELEVANT}
    digest = hashlib.sha256(json.dumps(relevant, sort_keys=True, separators=(",", ":")).encode())
    for path in sorted(folder.glob("*.safetensors")) if weights else ():
        sha256 = cache.digest(path, _file_digest) if cache else _file_digest(path)
        digest.update(f"\n{path.name} {sha256}".encode())
    return digest.hexdigest()


def tokenizer_digest(folder: Path) -> str | None:
    """Digest, hex, of the folder's tokenizer files; None where it has none."""
    found = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    if not found:
        return None
    digest = hashlib.sha256()
    for path in found:
        digest.update(f"{path.name} {_file_digest(path)}\n".encode())
    return digest.hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
