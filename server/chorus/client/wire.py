"""From protobuf to results, field by field. The only place in the client that reads response messages."""

from collections.abc import Iterable
from datetime import UTC, datetime

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from chorus.admin.v1 import adapters_pb2 as admin_pb2
from chorus.client.results import (
    Adapter,
    AdapterVersion,
    Model,
    PushedVersion,
    Residency,
    ResidencyTotals,
    ResidentVersion,
    Score,
    Scores,
    Timing,
    TokenLogprob,
    Usage,
)
from chorus.v1 import adapter_pb2, generate_pb2, model_pb2, tasks_pb2


def finish_reason(value: "generate_pb2.FinishReason.ValueType") -> str | None:
    """Gives `stop` for FINISH_REASON_STOP and so on; None where unset."""
    if value == generate_pb2.FINISH_REASON_UNSPECIFIED:
        return None
    known = value in generate_pb2.FinishReason.values()
    # A newer server may know a reason that this client does not.
    return generate_pb2.FinishReason.Name(value).removeprefix("FINISH_REASON_").lower() if known else f"unknown_{value}"


def usage(pb: generate_pb2.Usage) -> Usage:
    return Usage(pb.prompt_tokens, pb.cached_tokens, pb.completion_tokens)


def timing(pb: generate_pb2.Timing) -> Timing:
    return Timing(
        queue=_seconds(pb.queue),
        adapter_load=_seconds(pb.adapter_load),
        first_token=_seconds(pb.first_token),
        total=_seconds(pb.total),
    )


def logprobs(entries: Iterable[generate_pb2.TokenLogprobs]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(entry.logprob, dict(sorted(entry.top.items(), key=lambda item: (-item[1], item[0]))))
        for entry in entries
    )


def scores(pb: tasks_pb2.ScoreResponse) -> Scores:
    found = tuple(Score(one.logprob, tuple(one.token_logprobs), tuple(one.token_ids)) for one in pb.scores)
    return Scores(found, pb.adapter_version)


def model(pb: model_pb2.Model) -> Model:
    return Model(
        name=pb.name,
        digest=pb.digest,
        model_type=pb.model_type,
        context_length=pb.context_length,
        vocab_size=pb.vocab_size,
        dtype=pb.dtype,
        parameter_count=pb.parameter_count,
        has_tokenizer=pb.has_tokenizer,
        max_rank=pb.max_rank,
        eos_token_ids=tuple(pb.eos_token_ids),
        has_chat_template=pb.has_chat_template,
        methods=tuple(pb.methods),
    )


def adapter(pb: adapter_pb2.Adapter) -> Adapter:
    return Adapter(
        name=pb.name,
        aliases=dict(sorted(pb.aliases.items())),
        etag=pb.etag,
        create_time=_moment(pb.create_time),
        update_time=_moment(pb.update_time),
        version_count=pb.version_count,
    )


def version(pb: adapter_pb2.AdapterVersion) -> AdapterVersion:
    return AdapterVersion(
        name=pb.name,
        digest=pb.digest,
        kind=pb.kind,
        max_rank=pb.max_rank,
        size_bytes=pb.size_bytes,
        site_count=pb.site_count,
        create_time=_moment(pb.create_time),
        pinned=pb.pinned,
        task=pb.task,
        metrics=dict(sorted(pb.metrics.items())),
        has_chat_template=pb.has_chat_template,
        alpha=pb.alpha,
        target_modules=tuple(pb.target_modules),
    )


def pushed(pb: admin_pb2.CreateAdapterVersionResponse) -> PushedVersion:
    return PushedVersion(
        name=pb.adapter.name,
        digest=pb.version.digest,
        version=pb.version.name,
        kind=pb.version.kind,
        max_rank=pb.version.max_rank,
        size_bytes=pb.version.size_bytes,
        created=pb.created,
        aliases=dict(sorted(pb.adapter.aliases.items())),
        etag=pb.adapter.etag,
    )


def residency(pb: admin_pb2.GetResidencyResponse) -> Residency:
    totals = ResidencyTotals(
        rows_total=pb.rows_total,
        rows_used=pb.rows_used,
        bytes_total=pb.bytes_total,
        bytes_used=pb.bytes_used,
        kv_blocks_total=pb.kv_blocks_total,
        kv_blocks_used=pb.kv_blocks_used,
    )
    return Residency(tuple(_resident(version) for version in pb.versions), totals)


def _resident(pb: admin_pb2.ResidentVersion) -> ResidentVersion:
    return ResidentVersion(
        digest=pb.digest,
        names=tuple(pb.names),
        tier=admin_pb2.Tier.Name(pb.tier).removeprefix("TIER_").lower(),
        bytes=pb.bytes,
        rank_rows=pb.rank_rows,
        max_rank=pb.max_rank,
        refs=pb.refs,
        pinned=pb.pinned,
        hits=pb.hits,
    )


def _seconds(pb: Duration) -> float:
    return pb.seconds + pb.nanos / 1e9


def _moment(pb: Timestamp) -> datetime:
    return pb.ToDatetime(tzinfo=UTC)
