"""What the client hands back: frozen, plain, ready for `dataclasses.asdict`. Durations are seconds, sizes bytes.

Knows nothing of grpc or of the wire; `client.wire` builds these from it.
"""

from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any


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
class TokenLogprob:
    """Natural log-probability of a token, and of the likeliest ones, by token id, likeliest first."""

    logprob: float
    top: dict[int, float]


@dataclass(frozen=True, slots=True)
class Delta:
    """What came since the last one of output `index`; `finish_reason` is set on that output's last."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str | None
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Output:
    """One of the n outputs. `text` is None where the base has no tokenizer; `logprobs` is empty unless asked for.

    `finish_reason` is `stop`, `length`, `stop_string` or `aborted`.
    """

    token_ids: tuple[int, ...]
    text: str | None
    finish_reason: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer: `outputs` holds the n that were asked for; the properties speak of the first.

    `version` is the resource name of the adapter version that answered, empty for the base model. `prompt_logprobs`
    has one entry for each token of the prompt but the first, none unless asked for.
    """

    outputs: tuple[Output, ...]
    usage: Usage
    timing: Timing
    version: str
    prompt_logprobs: tuple[TokenLogprob, ...] = ()

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.outputs[0].token_ids

    @property
    def text(self) -> str | None:
        return self.outputs[0].text

    @property
    def finish_reason(self) -> str:
        return self.outputs[0].finish_reason

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        return self.outputs[0].logprobs

    def to_json(self) -> dict[str, Any]:
        """Gives plain values for `json.dumps`: a single output's fields flat, several under `outputs`.

        Log-probabilities are there only where there are any.
        """
        outputs = [_without_empty_logprobs(asdict(output)) for output in self.outputs]
        whole = {name: value for name, value in asdict(self).items() if name != "outputs"}
        if not self.prompt_logprobs:
            del whole["prompt_logprobs"]
        return (outputs[0] if len(outputs) == 1 else {"outputs": outputs}) | whole


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a continuation is: `logprob` is the sum of `token_logprobs`, one for each of `token_ids`."""

    logprob: float
    token_logprobs: tuple[float, ...]
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Scores:
    """One score a continuation, in order; `version` as in `Completion`."""

    scores: tuple[Score, ...]
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
    has_chat_template: bool = False
    alpha: float = 0.0
    target_modules: tuple[str, ...] = ()


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


def _without_empty_logprobs(output: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in output.items() if name != "logprobs" or value}
