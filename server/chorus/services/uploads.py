"""Receives an adapter's files. Nothing is left of what fails.

    header ─> names and sizes ─> chunks into a temporary folder ─> (the engine checks them: `adapters.checks`)

Files are written on threads of their own; the event loop only moves chunks.
"""

import asyncio
import shutil
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

from chorus.adapters import artifact as artifacts
from chorus.adapters.durable import disk_full_is_resource_exhausted
from chorus.admin.v1 import adapters_pb2
from chorus.errors import DeadlineExceeded, InvalidArgument

T = TypeVar("T")
Requests = AsyncIterator[adapters_pb2.CreateAdapterVersionRequest]

MAX_HEADER_FILES = 3
STALLED_AFTER_S = 60.0
_THREADS = 2


class Uploads:
    """Temporary folders under `tmp`, and the threads that write."""

    def __init__(self, tmp: Path, *, max_bytes: int) -> None:
        self._tmp = tmp
        self._max_bytes = max_bytes
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="upload")

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def folder(self) -> AsyncIterator[Path]:
        """A fresh folder that is gone afterwards, whatever happens and whenever it is cancelled."""
        path = self._tmp / f"upload-{uuid.uuid4().hex}"
        try:
            with disk_full_is_resource_exhausted():
                await self._off_loop(path.mkdir)
            yield path
        finally:
            await self._off_loop(shutil.rmtree, path, True)

    def check_header(self, header: adapters_pb2.UploadHeader) -> None:
        """Raises InvalidArgument for a file that an adapter does not have, a size out of range, a total too large."""
        if not 1 <= len(header.files) <= MAX_HEADER_FILES:
            text = f"must name 1 to {MAX_HEADER_FILES} files"
            raise InvalidArgument(f"header.files: {text}", field="header.files")
        seen = set()
        for i, file in enumerate(header.files):
            artifacts.check_file_name(file.name, f"header.files[{i}].name")
            if file.name in seen:
                raise InvalidArgument(f"header.files[{i}].name: named twice", field=f"header.files[{i}].name")
            seen.add(file.name)
            if file.size_bytes < 0:
                field = f"header.files[{i}].size_bytes"
                raise InvalidArgument(f"{field}: must not be negative", field=field)
        if sum(file.size_bytes for file in header.files) > self._max_bytes:
            text = f"the files are larger than this server's limit of {self._max_bytes} bytes; see --max-adapter-mb"
            raise InvalidArgument(text, reason="ADAPTER_TOO_LARGE", field="header.files")

    async def receive(self, requests: Requests, files: Sequence[adapters_pb2.UploadFile], folder: Path) -> None:
        """Writes exactly the bytes that the header announced. Raises InvalidArgument for more or fewer."""
        chunks = _chunks(requests)
        left = b""
        for file in files:
            path, missing = folder / file.name, file.size_bytes
            await self._off_loop(_append, path, b"")
            while missing:
                left = left or await anext(chunks, b"")
                if not left:
                    text = f"the upload ended {missing} bytes before the end of {file.name}"
                    raise InvalidArgument(text, reason="UPLOAD_INCOMPLETE", field="chunk.data")
                piece, left = left[:missing], left[missing:]
                await self._off_loop(_append, path, piece)
                missing -= len(piece)
        if left or await anext(chunks, b""):
            text = "the upload has more bytes than its header announced"
            raise InvalidArgument(text, reason="UPLOAD_TOO_LONG", field="chunk.data")

    async def _off_loop(self, function: Callable[..., T], *args: object) -> T:
        """Runs it on an upload thread; even when cancelled, returns only when the thread is done with it."""
        future = asyncio.get_running_loop().run_in_executor(self._threads, function, *args)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            raise


def _append(path: Path, data: bytes) -> None:
    """Opens the file each time: an open file would have no owner when its upload is cancelled."""
    with disk_full_is_resource_exhausted(), path.open("ab") as file:
        file.write(data)


async def next_request(requests: Requests) -> adapters_pb2.CreateAdapterVersionRequest | None:
    """The upload's next message; None at its end. Raises DeadlineExceeded when the client stalls."""
    try:
        async with asyncio.timeout(STALLED_AFTER_S):
            return await anext(requests, None)
    except TimeoutError:
        text = f"nothing came for {STALLED_AFTER_S:g} seconds; start the upload again"
        raise DeadlineExceeded(text, reason="UPLOAD_STALLED") from None


async def _chunks(requests: Requests) -> AsyncIterator[bytes]:
    """The data of all chunks that have any."""
    while (request := await next_request(requests)) is not None:
        if request.WhichOneof("part") != "chunk":
            raise InvalidArgument("only the first message has a header, all others have a chunk", field="chunk")
        if request.chunk.data:
            yield request.chunk.data
