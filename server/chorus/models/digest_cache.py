"""Digests of weight files, remembered by path, size and time of change, so that a restart need not hash them again.

A file changed behind the clock's back (same size, same time) keeps its old digest; delete the cache after such surgery.
"""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class DigestCache:
    """A small JSON file. What can not be read is hashed anew, what can not be written is only logged."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def digest(self, path: Path, compute: Callable[[Path], str]) -> str:
        """The file's digest: the remembered one where size and time agree, else `compute(path)`."""
        stat = path.stat()
        key, state = str(path.resolve()), [stat.st_size, stat.st_mtime_ns]
        known = self._read()
        entry = known.get(key)
        if isinstance(entry, dict) and entry.get("state") == state and isinstance(entry.get("sha256"), str):
            return str(entry["sha256"])
        digest = compute(path)
        self._write({**known, key: {"state": state, "sha256": digest}})
        return digest

    def _read(self) -> dict[str, Any]:
        try:
            known = json.loads(self._file.read_text())
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    def _write(self, known: dict[str, Any]) -> None:
        fresh = self._file.with_suffix(f".{os.getpid()}")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(json.dumps(known, indent=1))
            fresh.replace(self._file)
        except OSError as error:
            logger.warning("the digests of the base's files could not be kept: %s", error.strerror)
