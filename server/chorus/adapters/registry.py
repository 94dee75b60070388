"""The registry: which adapters, versions and aliases there are, durably, and who still needs which content.

A change is on disk (`registry_folder`) before it is visible and before the call returns. Everything is kept in memory,
so that reading takes no disk and waits for no writer; `create_version` and its kind sync files and belong on a worker
thread.

Content (a digest) may be named by several records, of several tenants, and be held by leases of running requests and
uploads. When the last of either goes, `on_unreferenced(digest)` is called, under the registry's lock so that no lease
can come in between: it must be quick and must not call back.

Knows names, records and digests; not blobs, not tensors.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from chorus.adapters import pages, records
from chorus.adapters.names import AdapterName, check_digest
from chorus.adapters.records import AdapterRecord, VersionRecord, unknown_adapter
from chorus.adapters.registry_folder import RegistryFolder

logger = logging.getLogger(__name__)


class Lease:
    """Keeps one version's content from being removed; release it, or use it as a context manager. Releases once."""

    def __init__(self, digest: str, release: Callable[[str], None]) -> None:
        self.digest = digest
        self._release: Callable[[str], None] | None = release

    def release(self) -> None:
        release, self._release = self._release, None
        if release:
            release(self.digest)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


class Registry:
    """The registry under `root` (the state folder's `registry/`). Thread-safe; one process at a time.

    Raises:
        Unavailable: another process holds this registry.
        DataLoss: a file in it is damaged.
    """

    def __init__(
        self,
        root: Path,
        *,
        on_unreferenced: Callable[[str], None] = lambda digest: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._on_unreferenced = on_unreferenced
        self._clock = clock
        self._writing = threading.Lock()  # one change at a time, disk included
        self._lock = threading.Lock()  # memory alone; never held over a write
        self._adapters: dict[AdapterName, AdapterRecord] = {}
        self._names: dict[str, set[AdapterName]] = {}  # digest -> adapters that have it as a version
        self._leases: Counter[str] = Counter()
        self._folder = RegistryFolder(root)
        try:
            for record in self._folder.load():
                self._remember(record.name, record)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets another process take the registry."""
        self._folder.close()

    # Reading: memory only

    def get(self, name: AdapterName) -> AdapterRecord:
        """An adapter's record.

        Raises:
            NotFound: the same for everything unknown.
        """
        with self._lock:
            record = self._adapters.get(name.bare)
        if record is None:
            raise unknown_adapter()
        return record

    def list(
        self, tenant: str | None = None, page_size: int = 0, page_token: str = ""
    ) -> tuple[tuple[AdapterRecord, ...], str]:
        """One page of a tenant's adapters (of all, where None), by name, and the token of the next page.

        Raises:
            InvalidArgument: a negative size or a foreign token.
        """
        with self._lock:
            found = [record for name, record in self._adapters.items() if tenant in (None, name.tenant)]
        found.sort(key=_adapter_key)
        return pages.page(found, _adapter_key, pages.Request(page_size, page_token, f"adapters/{tenant or '-'}"))

    def versions(
        self, name: AdapterName, page_size: int = 0, page_token: str = ""
    ) -> tuple[tuple[VersionRecord, ...], str]:
        """One page of an adapter's versions, oldest first, and the token of the next page.

        Raises:
            NotFound
            InvalidArgument: a negative size or a foreign token.
        """
        record = self.get(name)
        request = pages.Request(page_size, page_token, f"{name.bare}/versions")
        return pages.page(record.versions, records.version_key, request)

    def resolve(self, name: AdapterName) -> VersionRecord:
        """The version that a name means; the alias `live` where it names none.

        Raises:
            NotFound: unknown adapter, alias or version.
            FailedPrecondition: the adapter has no `live` version.
        """
        return records.resolve(self.get(name), name)

    def names(self, digest: str) -> tuple[AdapterName, ...]:
        """The names of all versions that have this content."""
        with self._lock:
            holders = sorted(self._names.get(digest, ()), key=str)
        return tuple(name.version(digest) for name in holders)

    def digests(self) -> frozenset[str]:
        """The content of all versions: what the blob store must have."""
        with self._lock:
            return frozenset(self._names)

    def pinned(self) -> frozenset[str]:
        """The content that any adapter has pinned."""
        with self._lock:
            return frozenset(
                version.digest for record in self._adapters.values() for version in record.versions if version.pinned
            )

    def of_other_bases(self, base_digest: str) -> frozenset[str]:
        """The content of versions that are known to be made for another base than this one."""
        with self._lock:
            return frozenset(
                version.digest
                for record in self._adapters.values()
                for version in record.versions
                if version.base_digest not in ("", base_digest)
            )

    # Leases

    def lease(self, digest: str) -> Lease:
        """Keeps this content, registered or not; an upload takes one before it puts the blob."""
        check_digest(digest)
        with self._lock:
            self._leases[digest] += 1
        return Lease(digest, self._end_lease)

    def hold(self, name: AdapterName) -> tuple[VersionRecord, Lease]:
        """Resolves a name and leases its content in one step, so that nothing can remove it in between.

        Raises:
            NotFound, FailedPrecondition: as `resolve`.
        """
        with self._lock:
            record = self._adapters.get(name.bare)
            if record is None:
                raise unknown_adapter()
            version = records.resolve(record, name)
            self._leases[version.digest] += 1
        return version, Lease(version.digest, self._end_lease)

    # Changes: on disk before they return

    def create_version(
        self, name: AdapterName, version: VersionRecord, alias: str | None
    ) -> tuple[AdapterRecord, bool]:
        """Adds a version, makes the adapter if need be, and points `alias` at it, all at once.

        False where the adapter had this content already (the alias still moves). The same `request_id` with the same
        content gets the first call's answer again, and moves nothing.

        Raises:
            InvalidArgument: a bad alias or digest; a request id that was used for other content.
            ResourceExhausted: the disk is full.
        """
        with self._writing:
            old = self._adapters.get(name.bare)
            earlier = records.version_of_request(old, version.request_id) if old else None
            if old and earlier and earlier.digest == version.digest:
                return old, True
            now = self._clock()
            record = records.with_version(old or records.new_adapter(name, now), version, alias, now)
            self._commit(name.bare, record)
            return record, old is None or old.version(version.digest) is None

    def set_alias(self, name: AdapterName, alias: str, digest: str, etag: str = "") -> AdapterRecord:
        """Points an alias at a version, or removes it where `digest` is empty. An empty `etag` is not checked.

        Raises:
            InvalidArgument, NotFound
            Aborted: stale etag.
        """
        with self._writing:
            record = records.with_alias(self.get(name), alias, digest, self._clock(), etag)
            self._commit(name.bare, record)
            return record

    def set_pinned(self, name: AdapterName, digest: str, pinned: bool) -> VersionRecord:
        """Pins or unpins a version.

        Raises:
            NotFound
        """
        with self._writing:
            self._commit(name.bare, records.with_pin(self.get(name), digest, pinned, self._clock()))
        return self.resolve(name.version(digest))

    def delete_version(self, name: AdapterName, digest: str) -> None:
        """Deletes one version.

        Raises:
            NotFound
            FailedPrecondition: an alias points at it.
        """
        with self._writing:
            self._commit(name.bare, records.without_version(self.get(name), digest, self._clock()))

    def delete_adapter(self, name: AdapterName) -> None:
        """Deletes an adapter with all its versions and aliases.

        Raises:
            NotFound
        """
        with self._writing:
            self._folder.remove(self.get(name).name)
            self._remember(name.bare, None)

    # Inside

    def _commit(self, name: AdapterName, record: AdapterRecord) -> None:
        if record is not self._adapters.get(name):
            self._folder.save(record)
            self._remember(name, record)

    def _remember(self, name: AdapterName, record: AdapterRecord | None) -> None:
        """Puts a record (None: nothing) in memory, and lets go of what it no longer names."""
        with self._lock:
            old = self._adapters.pop(name, None)
            if record:
                self._adapters[name] = record
            before = {version.digest for version in old.versions} if old else set()
            after = {version.digest for version in record.versions} if record else set()
            for digest in after - before:
                self._names.setdefault(digest, set()).add(name)
            for digest in before - after:
                self._names[digest].discard(name)
                if not self._names[digest]:
                    del self._names[digest]
                self._let_go(digest)

    def _end_lease(self, digest: str) -> None:
        with self._lock:
            self._leases[digest] -= 1
            if not self._leases[digest]:
                del self._leases[digest]
            self._let_go(digest)

    def _let_go(self, digest: str) -> None:
        """Under the lock: tells if neither a record nor a lease holds this content."""
        if digest in self._names or digest in self._leases:
            return
        try:
            self._on_unreferenced(digest)
        except Exception:
            logger.exception("content %s could not be removed; the next start sweeps it", digest)


def _adapter_key(record: AdapterRecord) -> tuple[str, ...]:
    return record.name.tenant, record.name.adapter
