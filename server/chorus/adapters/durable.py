"""Writing that survives a crash: synced files, synced folders, and a full disk told apart from a bug."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chorus.errors import ResourceExhausted

_FULL = (errno.ENOSPC, errno.EDQUOT)
_RETRY_AFTER_S = 60.0


def write_synced(path: Path, source: bytes | Path) -> None:
    """Writes bytes, or copies a file, to a new file and syncs it."""
    with path.open("xb") as file:
        if isinstance(source, Path):
            with source.open("rb") as original:
                shutil.copyfileobj(original, file, 1 << 20)
        else:
            file.write(source)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Makes a folder's entries (creations, renames, removals) durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Creates a folder and its parents, durably."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync_folder(path.parent)


@contextmanager
def disk_full_is_resource_exhausted() -> Iterator[None]:
    """Turns "no space left" into ResourceExhausted DISK_FULL; other OSErrors stay what they are."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise ResourceExhausted(
            "the server's disk is full", reason="DISK_FULL", retry_after_s=_RETRY_AFTER_S
        ) from error
