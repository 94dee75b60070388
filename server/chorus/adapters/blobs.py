"""Adapter files by content: `sha256/xx/DIGEST/` under the store's root, complete or absent.

    put:     tmp/RANDOM/ (written, synced) ── rename ──> sha256/xx/DIGEST/ (folder synced)
    delete:  sha256/xx/DIGEST/ ── rename ──> tmp/RANDOM/, removed on a thread of its own

Renames on one file system are atomic, so a crash leaves at worst a folder under `tmp`, or a blob that no record names;
`sweep` removes both at start. Files in a blob never change. Knows bytes and digests, not adapters; what a digest is
over is the caller's matter (`chorus.adapters.digest`).

Thread-safe. Whoever puts a blob for a digest that others may be deleting holds a lease on it (`registry`) meanwhile.
"""

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from chorus.adapters.durable import disk_full_is_resource_exhausted, make_folder, sync_folder, write_synced
from chorus.adapters.names import check_digest


class BlobStore:
    """The blobs under `root` (the state folder's `blobs/`), which is created where it is missing."""

    def __init__(self, root: Path) -> None:
        self._tmp = root / "tmp"
        self._blobs = root / "sha256"
        with disk_full_is_resource_exhausted():
            make_folder(self._tmp)
            make_folder(self._blobs)
        self._remover = ThreadPoolExecutor(1, thread_name_prefix="chorus-blob-remover")

    def close(self) -> None:
        """Waits for what is being removed. Afterwards only reading is possible."""
        self._remover.shutdown()

    def path(self, digest: str) -> Path:
        """The folder of this blob, whether it exists or not.

        Raises:
            InvalidArgument: not a digest.
        """
        check_digest(digest)
        return self._blobs / digest[:2] / digest

    def exists(self, digest: str) -> bool:
        """Whether the blob is there, which means: complete."""
        return self.path(digest).is_dir()

    def put(self, digest: str, files: Mapping[str, Path | bytes]) -> Path:
        """Stores files by name and gives back their folder; does nothing where the blob exists.

        Raises:
            ResourceExhausted: DISK_FULL; nothing partial is left.
        """
        final = self.path(digest)
        if final.is_dir():
            return final
        staged = self._new_tmp()
        try:
            with disk_full_is_resource_exhausted():
                staged.mkdir()
                for name, source in files.items():
                    if Path(name).name != name or name in ("", ".."):
                        raise ValueError(f"not a plain file name: {name!r}")
                    write_synced(staged / name, source)
                sync_folder(staged)
                make_folder(final.parent)
                _rename(staged, final)
                sync_folder(final.parent)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        return final

    def delete(self, digest: str) -> None:
        """Takes a blob away; does nothing where there is none. Files that are open stay readable.

        Quick, for callers that hold a lock: only the rename happens here. Should a crash undo it, the next start
        finds a blob that no record names.
        """
        doomed = self._new_tmp()
        try:
            self.path(digest).rename(doomed)
        except FileNotFoundError:
            return
        self._remover.submit(self._remove_doomed, doomed, self.path(digest).parent)

    def sweep(self, known: Collection[str]) -> tuple[str, ...]:
        """Removes what crashes have left: everything under `tmp`, and blobs whose digest is not in `known`.

        For the start of the server, before anything is put. Gives back the digests that were removed.
        """
        for leftover in self._tmp.iterdir():
            _remove(leftover)
        orphans = []
        for blob in sorted(self._blobs.glob("*/*")):
            if blob.name not in known:
                orphans.append(blob.name)
                _remove(blob)
                sync_folder(blob.parent)
        return tuple(orphans)

    def _remove_doomed(self, doomed: Path, parent: Path) -> None:
        with contextlib.suppress(OSError):
            sync_folder(parent)
        shutil.rmtree(doomed, ignore_errors=True)

    def _new_tmp(self) -> Path:
        return self._tmp / uuid.uuid4().hex


def _rename(staged: Path, final: Path) -> None:
    try:
        staged.rename(final)
    except OSError as error:
        # Another put of the same content was faster: a non-empty folder is never replaced.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        os.unlink(path)
