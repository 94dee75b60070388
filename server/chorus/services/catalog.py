"""Adapters as the services see them: the registry and the blob store together, in the contract's messages.

Whatever writes runs on a worker thread; what only reads memory runs on the event loop.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from chorus import failpoints, logs
from chorus.adapters.blobs import BlobStore
from chorus.adapters.names import AdapterName, parse_name
from chorus.adapters.records import AdapterRecord, CheckedAdapter, VersionRecord
from chorus.adapters.registry import Lease, Registry
from chorus.engine.messages import AdapterRef
from chorus.errors import DataLoss, FailedPrecondition
from chorus.services.identity import Tenant
from chorus.services.resources import adapter_message, version_message
from chorus.v1 import adapter_pb2

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Leased:
    """What a call runs on, held until the call ends. For the base model `adapter` is None and the name empty.

    `chat_template` is the SHA-256 of the adapter's own chat template, "" where it has none.
    """

    adapter: AdapterRef | None
    version_name: str
    tenant: str | None
    chat_template: str = ""


class Catalog:
    """The registry and the blobs under a state folder. Opening it sweeps what a crash has left.

    `base_digest` is the running base's: versions made for another one are listed, but not served.
    `on_removed(digest)` is called, on any thread, when the last that needed a content is gone.

    Raises:
        ChorusError: the registry is held by another process or is damaged; the disk is full.
    """

    def __init__(self, state_dir: Path, base_digest: str) -> None:
        self._base_digest = base_digest
        self.on_removed: Callable[[str], None] = lambda digest: None
        self._blobs = BlobStore(state_dir / "blobs")
        self._registry = Registry(state_dir / "registry", on_unreferenced=self._unreferenced)
        self._damaged: set[str] = set()
        self.tmp = state_dir / "blobs" / "tmp"
        known = self._registry.digests()
        for digest in self._blobs.sweep(known):
            log.warning("swept %s, which no adapter names", digest)
        for digest in known:
            if not self._blobs.exists(digest):
                log.error("the files of version %s are missing", digest)

    def close(self) -> None:
        self._registry.close()
        self._blobs.close()

    @contextmanager
    def lease(self, adapter: str, caller: Tenant) -> Iterator[Leased]:
        """What a call names, kept until the end of the block; the base model where it names nothing.

        Raises:
            InvalidArgument: not a name.
            NotFound: unknown adapter, alias or version.
            FailedPrecondition: the adapter has no live version; the version is made for another base.
        """
        if not adapter:
            logs.note(tenant=caller.id)
            yield Leased(None, "", caller.id)
            return
        name = parse_name(adapter)
        with self._hold(name) as (ref, version):
            owner = caller.acting_on(name.tenant).id
            logs.note(tenant=owner, adapter_version=ref.digest)
            yield Leased(ref, str(name.version(ref.digest)), owner, version.chat_template)

    @contextmanager
    def hold(self, name: AdapterName) -> Iterator[AdapterRef]:
        """The version that a name means, kept until the end of the block. Raises NotFound, FailedPrecondition."""
        with self._hold(name) as (ref, _):
            yield ref

    @contextmanager
    def _hold(self, name: AdapterName) -> Iterator[tuple[AdapterRef, VersionRecord]]:
        version, lease = self._registry.hold(name)
        try:
            self._check_base(version)
            yield AdapterRef(version.digest, str(self._blobs.path(version.digest))), version
        except DataLoss:
            self._damaged.add(version.digest)
            raise
        finally:
            self._release(lease)

    def adapter(self, name: AdapterName) -> adapter_pb2.Adapter:
        return adapter_message(self._registry.get(name))

    def version(self, name: AdapterName) -> adapter_pb2.AdapterVersion:
        return version_message(name, self._registry.resolve(name))

    def names(self, digest: str) -> list[str]:
        """Resource names of all versions with this content."""
        return [str(name) for name in self._registry.names(digest)]

    def is_pinned(self, digest: str) -> bool:
        """Whether any adapter has this content pinned."""
        return digest in self._registry.pinned()

    def pinned(self) -> list[AdapterRef]:
        """What is pinned and made for the running base; the rest is logged."""
        pinned = self._registry.pinned()
        others = pinned & self._registry.of_other_bases(self._base_digest)
        for digest in sorted(others):
            log.warning("version %s is not pinned again: it is made for another base", digest)
        return [AdapterRef(digest, str(self._blobs.path(digest))) for digest in sorted(pinned - others)]

    async def adapters(self, tenant: str | None, size: int, token: str) -> tuple[list[adapter_pb2.Adapter], str]:
        """One page of a tenant's adapters, of all where None, and the next page's token."""
        records, token = await asyncio.to_thread(self._registry.list, tenant, size, token)
        return [adapter_message(record) for record in records], token

    async def versions(self, name: AdapterName, size: int, token: str) -> tuple[list[adapter_pb2.AdapterVersion], str]:
        """One page of an adapter's versions, oldest first, and the next page's token."""
        records, token = await asyncio.to_thread(self._registry.versions, name, size, token)
        return [version_message(name, record) for record in records], token

    async def publish(
        self, name: AdapterName, upload: CheckedAdapter, files: Sequence[Path], *, alias: str, request_id: str
    ) -> tuple[AdapterRecord, bool]:
        """Stores the files and registers the version; False where the adapter had it already."""
        return await asyncio.to_thread(self._publish, name, upload, files, alias, request_id)

    async def set_alias(self, name: AdapterName, alias: str, digest: str, etag: str) -> adapter_pb2.Adapter:
        record = await asyncio.to_thread(self._registry.set_alias, name, alias, digest, etag)
        return adapter_message(record)

    async def set_pinned(self, name: AdapterName, pinned: bool) -> adapter_pb2.AdapterVersion:
        version = await asyncio.to_thread(self._registry.set_pinned, name, str(name.digest), pinned)
        return version_message(name, version)

    async def delete_version(self, name: AdapterName) -> None:
        await asyncio.to_thread(self._registry.delete_version, name, str(name.digest))

    async def delete_adapter(self, name: AdapterName) -> list[str]:
        """The digests that the adapter had."""
        digests = [version.digest for version in self._registry.get(name).versions]
        await asyncio.to_thread(self._registry.delete_adapter, name)
        return digests

    def _publish(
        self, name: AdapterName, upload: CheckedAdapter, files: Sequence[Path], alias: str, request_id: str
    ) -> tuple[AdapterRecord, bool]:
        version = VersionRecord(
            digest=upload.digest,
            kind=upload.kind,
            max_rank=upload.max_rank,
            size_bytes=upload.size_bytes,
            site_count=upload.site_count,
            create_time=time.time(),
            task=upload.task,
            metrics=upload.metrics,
            request_id=request_id,
            base_digest=self._base_digest,
            chat_template=upload.chat_template,
            alpha=upload.alpha,
            target_modules=upload.target_modules,
        )
        failpoints.hit("publish.checked")
        with self._registry.lease(upload.digest):
            if upload.digest in self._damaged:
                # Found out by a call that failed; what has just been checked takes the place of what is there.
                self._blobs.delete(upload.digest)
                self._damaged.discard(upload.digest)
            self._blobs.put(upload.digest, {file.name: file for file in files})
            failpoints.hit("publish.stored")
            created = self._registry.create_version(name, version, alias or None)
        failpoints.hit("publish.recorded")
        return created

    def _check_base(self, version: VersionRecord) -> None:
        """Raises FailedPrecondition for a version that is known to be made for another base."""
        if version.base_digest not in ("", self._base_digest):
            raise FailedPrecondition(
                f"this version is made for the base {version.base_digest[:12]}, this server runs "
                f"{self._base_digest[:12]}; serve that base, or train and upload the adapter for this one",
                reason="BASE_MISMATCH",
            )

    def _release(self, lease: Lease) -> None:
        """The last lease of a deleted version removes its files, which is not for the event loop."""
        if self._registry.names(lease.digest):
            lease.release()
        else:
            asyncio.get_running_loop().run_in_executor(None, lease.release)

    def _unreferenced(self, digest: str) -> None:
        self._blobs.delete(digest)
        self.on_removed(digest)
