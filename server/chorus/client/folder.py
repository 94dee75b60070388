"""An adapter's folder on this machine: which files of it are sent, and their bytes.

Only three names are ever opened, never through a symbolic link, so that a push can not carry away a file that merely
looks like part of an adapter. What the files hold is the server's to judge.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from chorus.errors import InvalidArgument

CHUNK_BYTES = 1 << 20
REQUIRED = ("adapter_config.json", "adapter_model.safetensors")
OPTIONAL = ("task.json",)
PICKLES = tuple(f"adapter_model{suffix}" for suffix in (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"))


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A file of the folder, opened; `size_bytes` is what will be sent of it, no more and no less."""

    name: str
    size_bytes: int
    handle: BinaryIO


class AdapterFolder:
    """The files of one adapter, held open while they are sent, so that what was checked is what is read.

    Raises:
        InvalidArgument: weights in a pickle, a file missing, a symbolic link or not a regular file.
        OSError: the folder or a file can not be read.
    """

    def __init__(self, folder: Path) -> None:
        self._stack = ExitStack()
        with self._stack:
            names = set(os.listdir(folder))
            _refuse_incomplete(folder, names)
            wanted = [name for name in (*REQUIRED, *OPTIONAL) if name in names]
            self.files: Sequence[OpenFile] = [self._open(folder / name) for name in wanted]
            self._stack = self._stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    def chunks(self, on_progress: Callable[[int, int], None] | None = None) -> Iterator[bytes]:
        """Yields all files' bytes in order, at most `CHUNK_BYTES` each; tells `on_progress` (sent, total) after each.

        Raises:
            InvalidArgument: a file became shorter meanwhile.
        """
        sent = 0
        for file in self.files:
            left = file.size_bytes
            while left:
                data = file.handle.read(min(left, CHUNK_BYTES))
                if not data:
                    raise InvalidArgument(f"{file.name} changed while it was sent; push again", reason="FILE_CHANGED")
                yield data
                left -= len(data)
                sent += len(data)
                if on_progress is not None:
                    on_progress(sent, self.size_bytes)

    def _open(self, path: Path) -> OpenFile:
        if path.is_symlink():
            raise InvalidArgument(
                f"{path.name} is a symbolic link; push a folder that holds the file itself", reason="NOT_A_REGULAR_FILE"
            )
        if not path.is_file():
            raise InvalidArgument(f"{path.name} is not a regular file", reason="NOT_A_REGULAR_FILE")
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        handle = self._stack.enter_context(os.fdopen(descriptor, "rb"))
        return OpenFile(path.name, os.fstat(descriptor).st_size, handle)


def _refuse_incomplete(folder: Path, names: set[str]) -> None:
    config, weights = REQUIRED
    pickles = names.intersection(PICKLES)
    if pickles and weights not in names:
        raise InvalidArgument(
            f"{min(pickles)} is a pickle, which runs code when loaded; save the adapter as {weights}",
            reason="PICKLE_REFUSED",
        )
    for name in (config, weights):
        if name not in names:
            raise InvalidArgument(f"{folder} holds no {name}", reason="MISSING_FILE")
