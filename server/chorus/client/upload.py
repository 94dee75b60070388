"""The messages of one push, from an adapter's folder."""

import uuid
from collections.abc import Callable, Iterator

from chorus.admin.v1 import adapters_pb2 as admin_pb2
from chorus.client.folder import AdapterFolder
from chorus.errors import ChorusError


class Upload:
    """One push: the messages of CreateAdapterVersion, header first. `failure` is what broke off reading the files.

    gRPC swallows what a request iterator raises, so it is kept here too.
    """

    def __init__(
        self, parent: str, alias: str | None, files: AdapterFolder, on_progress: Callable[[int, int], None] | None
    ) -> None:
        self.failure: OSError | ChorusError | None = None
        self._chunks = files.chunks(on_progress)
        self._header = admin_pb2.UploadHeader(
            parent=parent,
            request_id=uuid.uuid4().hex,
            alias=alias or "",
            files=[admin_pb2.UploadFile(name=file.name, size_bytes=file.size_bytes) for file in files.files],
        )

    def messages(self) -> Iterator[admin_pb2.CreateAdapterVersionRequest]:
        """Yields them as they are sent."""
        yield admin_pb2.CreateAdapterVersionRequest(header=self._header)
        try:
            for data in self._chunks:
                yield admin_pb2.CreateAdapterVersionRequest(chunk=admin_pb2.UploadChunk(data=data))
        except (OSError, ChorusError) as error:
            self.failure = error
            raise
