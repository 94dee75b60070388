"""What the client hands back: frozen, plain, ready for `dataclasses.asdict`. Durations are seconds, sizes bytes.

Knows nothing of grpc or of the wire; `client.wire` builds these from it.
"""

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request; `cached_tokens` are prompt tokens whose keys and values came from the cache."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds, on the server's clock. `queue` and `first_token` and `total` count from arrival."""

    queue: float
    adapter_load: float
    first_token: float
    total: float


@dataclass(frozen=True, slots=True)
class Delta:
    """What came since the last one; `finish_reason` is set on the last."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str | None


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer.

    `text` is None where the base has no tokenizer; `finish_reason` is `stop`, `length`, `stop_string` or `aborted`;
    `version` is the resource name of the adapter version that answered, empty for the base model.
    """

    token_ids: tuple[int, ...]
    text: str | None
    finish_reason: str
    usage: Usage
    timing: Timing
    version: str


@dataclass(frozen=True, slots=True)
class Model:
    """The base model's facts."""

    name: str
    digest: str
    model_type: str
    context_length: int
    vocab_size: int
    dtype: str
    parameter_count: int
    has_tokenizer: bool
    max_rank: int
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool
    methods: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Adapter:
    """A tenant's adapter; `aliases` maps alias to version digest, `etag` changes with them."""

    name: str
    aliases: dict[str, str]
    etag: str
    create_time: datetime
    update_time: datetime
    version_count: int


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One immutable version; `name` is its resource name, `task` and `metrics` are the exporter's word."""

    name: str
    digest: str
    kind: str
    max_rank: int
    size_bytes: int
    site_count: int
    create_time: datetime
    pinned: bool
    task: str
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class PushedVersion:
    """What a push stored: adapter `name`, `version` resource name; `created` is False where the content was there."""

    name: str
    digest: str
    version: str
    kind: str
    max_rank: int
    size_bytes: int
    created: bool
    aliases: dict[str, str]
    etag: str


@dataclass(frozen=True, slots=True)
class ResidentVersion:
    """A version in memory; `tier` is `device`, `host` or `loading`, `refs` the running requests that hold it."""

    digest: str
    names: tuple[str, ...]
    tier: str
    bytes: int
    rank_rows: int
    max_rank: int
    refs: int
    pinned: bool
    hits: int


@dataclass(frozen=True, slots=True)
class ResidencyTotals:
    """The device's budget: rank rows and bytes of the adapter pools, blocks of the KV cache."""

    rows_total: int
    rows_used: int
    bytes_total: int
    bytes_used: int
    kv_blocks_total: int
    kv_blocks_used: int


@dataclass(frozen=True, slots=True)
class Residency:
    """What is in memory, where, and how much of the budget it takes."""

    versions: tuple[ResidentVersion, ...]
    totals: ResidencyTotals
