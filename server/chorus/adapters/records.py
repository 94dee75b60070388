"""What the registry remembers: adapters, their aliases and versions, as values; and how each change makes a new value.

No disk, no locks, no clock: the functions here are the registry's rules, and can be tested as such.
"""

import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

from pydantic import TypeAdapter, ValidationError

from chorus.adapters.names import LIVE, AdapterName, check_digest, check_id
from chorus.adapters.strict_json import quote
from chorus.errors import Aborted, ChorusError, DataLoss, FailedPrecondition, InvalidArgument, NotFound


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """One immutable version, but for `pinned`. Times are seconds since 1970; sizes are bytes of the tensors as stored.

    `task` and `metrics` come from the task card. `request_id` is that of the upload that made the version, or "".
    `base_digest` is the base it was made for, "" in records of servers that did not keep it. `chat_template` is the
    SHA-256 of the adapter's own chat template, "" where it has none. `alpha` is 0 and `target_modules` empty in records
    of servers that did not keep them.
    """

    digest: str
    kind: str
    max_rank: int
    size_bytes: int
    site_count: int
    create_time: float
    pinned: bool = False
    task: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    request_id: str = ""
    base_digest: str = ""
    chat_template: str = ""
    alpha: float = 0.0
    target_modules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CheckedAdapter:
    """What `checks.check` found out about a sound adapter that fits the base; fields as in `VersionRecord`."""

    digest: str
    kind: str
    max_rank: int
    size_bytes: int
    site_count: int
    task: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    chat_template: str = ""
    alpha: float = 0.0
    target_modules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """A tenant's adapter: alias -> digest, and its versions, oldest first.

    `etag` is drawn anew with every change of the aliases, so that no state ever gets an earlier one's.
    """

    name: AdapterName
    aliases: Mapping[str, str]
    versions: tuple[VersionRecord, ...]
    etag: str
    create_time: float
    update_time: float

    def version(self, digest: str) -> VersionRecord | None:
        """The version with this digest."""
        return next((version for version in self.versions if version.digest == digest), None)


_ADAPTER_RECORD = TypeAdapter(AdapterRecord)


def unknown_adapter() -> NotFound:
    """The one answer for everything that is not there, and for what belongs to someone else."""
    return NotFound("no such adapter, alias or version", reason="ADAPTER_NOT_FOUND")


def new_adapter(name: AdapterName, now: float) -> AdapterRecord:
    """An adapter without versions."""
    return AdapterRecord(name.bare, {}, (), _new_etag(), now, now)


def with_version(record: AdapterRecord, version: VersionRecord, alias: str | None, now: float) -> AdapterRecord:
    """Adds a version (once), and points `alias` at it.

    Raises:
        InvalidArgument: a bad digest or alias; a request id that made another version.
    """
    check_digest(version.digest)
    earlier = version_of_request(record, version.request_id)
    if earlier and earlier.digest != version.digest:
        raise InvalidArgument(
            f"request_id: {quote(version.request_id)} has already made the version {earlier.digest}",
            reason="REQUEST_ID_REUSED",
            field="request_id",
        )
    if not record.version(version.digest):
        versions = sorted((*record.versions, version), key=version_key)
        record = replace(record, versions=tuple(versions), update_time=now)
    return with_alias(record, alias, version.digest, now) if alias else record


def version_of_request(record: AdapterRecord, request_id: str) -> VersionRecord | None:
    """The version that an upload with this id has made."""
    if not request_id:
        return None
    return next((version for version in record.versions if version.request_id == request_id), None)


def with_alias(record: AdapterRecord, alias: str, digest: str, now: float, etag: str = "") -> AdapterRecord:
    """Points an alias at a version; removes it where `digest` is empty.

    Raises:
        InvalidArgument: a bad alias or digest.
        NotFound: the adapter has no such version.
        Aborted: `etag` is given and not the record's.
    """
    check_id(alias, "alias")
    if digest and not record.version(check_digest(digest)):
        raise unknown_adapter()
    if etag and etag != record.etag:
        raise Aborted("etag: the adapter has changed since; read it again", field="etag")
    if record.aliases.get(alias, "") == digest:
        return record
    aliases = {key: value for key, value in record.aliases.items() if key != alias}
    if digest:
        aliases[alias] = digest
    return replace(record, aliases=aliases, etag=_new_etag(), update_time=now)


def with_pin(record: AdapterRecord, digest: str, pinned: bool, now: float) -> AdapterRecord:
    """Pins or unpins a version.

    Raises:
        NotFound
    """
    version = record.version(digest)
    if version is None:
        raise unknown_adapter()
    if version.pinned is pinned:
        return record
    changed = replace(version, pinned=pinned)
    versions = tuple(changed if version.digest == digest else version for version in record.versions)
    return replace(record, versions=versions, update_time=now)


def without_version(record: AdapterRecord, digest: str, now: float) -> AdapterRecord:
    """Takes a version away.

    Raises:
        NotFound
        FailedPrecondition: an alias points at it.
    """
    if not record.version(digest):
        raise unknown_adapter()
    pointing = sorted(alias for alias, target in record.aliases.items() if target == digest)
    if pointing:
        raise FailedPrecondition(
            f"the alias {pointing[0]} points at this version; move or remove it first", reason="VERSION_IN_USE"
        )
    versions = tuple(version for version in record.versions if version.digest != digest)
    return replace(record, versions=versions, update_time=now)


def resolve(record: AdapterRecord, name: AdapterName) -> VersionRecord:
    """The version that a name means; the alias `live` where it names none.

    Raises:
        NotFound: no such alias or version.
        FailedPrecondition: the name leaves the alias out, and there is no `live`.
    """
    alias = name.alias or LIVE
    digest = name.digest or record.aliases.get(alias)
    version = record.version(digest) if digest else None
    if version:
        return version
    if name == name.bare:
        raise FailedPrecondition(
            f"{name} has no live version; name another alias or a version, or set the alias live",
            reason="NO_LIVE_VERSION",
        )
    raise unknown_adapter()


def version_key(version: VersionRecord) -> tuple[float, str]:
    """The order of an adapter's versions: oldest first."""
    return version.create_time, version.digest


def to_json(record: AdapterRecord) -> bytes:
    """A record as the registry's files have it.

    Raises:
        ValueError: a metric that is not finite, or text that is no UTF-8: what could not be read back is never written.
    """
    return json.dumps(asdict(record), indent=1, allow_nan=False, ensure_ascii=False).encode()


def from_json(data: bytes, what: str) -> AdapterRecord:
    """Reads a record back.

    Raises:
        DataLoss: the file is not what `to_json` writes.
    """
    try:
        record = _ADAPTER_RECORD.validate_json(data, strict=True)
        for version in record.versions:
            check_digest(version.digest)
        if any(not record.version(digest) for digest in record.aliases.values()):
            raise unknown_adapter()
    except (ValidationError, ChorusError) as error:
        raise DataLoss(f"the registry's file {what} is damaged", reason="REGISTRY_DAMAGED") from error
    return record


def _new_etag() -> str:
    return secrets.token_hex(8)
