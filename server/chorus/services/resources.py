"""Registry records as the contract's messages."""

from google.protobuf.timestamp_pb2 import Timestamp

from chorus.adapters.names import AdapterName
from chorus.adapters.records import AdapterRecord, VersionRecord
from chorus.v1 import adapter_pb2


def adapter_message(record: AdapterRecord) -> adapter_pb2.Adapter:
    return adapter_pb2.Adapter(
        name=str(record.name),
        aliases=record.aliases,
        etag=record.etag,
        create_time=_timestamp(record.create_time),
        update_time=_timestamp(record.update_time),
        version_count=len(record.versions),
    )


def version_message(name: AdapterName, version: VersionRecord) -> adapter_pb2.AdapterVersion:
    """`name` is any name of the version's adapter."""
    return adapter_pb2.AdapterVersion(
        name=str(name.version(version.digest)),
        digest=version.digest,
        kind=version.kind,
        max_rank=version.max_rank,
        size_bytes=version.size_bytes,
        site_count=version.site_count,
        create_time=_timestamp(version.create_time),
        pinned=version.pinned,
        task=version.task,
        metrics=version.metrics,
        has_chat_template=bool(version.chat_template),
        alpha=version.alpha,
        target_modules=version.target_modules,
    )


def _timestamp(seconds: float) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromMicroseconds(int(seconds * 1e6))
    return timestamp
