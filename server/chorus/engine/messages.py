"""What crosses the line between the front end and the engine: flat, frozen, serialisable.

Commands go in; one `StepEvents` a step comes back. Nothing here holds a tensor, a socket or a lock, and
`chorus.engine.wire` puts these into bytes: msgspec structs, told apart by their names.
"""

import time
from enum import Enum

import msgspec

from chorus.adapters.records import CheckedAdapter


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"
    STOP_STRING = "stop_string"
    ABORTED = "aborted"


class Launch(Enum):
    """How a forward pass was launched where graphs are on: as one, or operator by operator and for what reason."""

    GRAPH = "graph"
    RECORDED = "recorded"
    """As a graph that was recorded just then."""
    RARE = "rare"
    """The batch's shape has not come often enough to be worth a recording."""
    PROMPT = "prompt"
    """Too much of it is of prompts, their tokens are scored, or nothing is sampled."""
    ADAPTER = "adapter"
    """An adapter does what no graph holds."""
    FAILED = "failed"
    """The shape's recording failed."""


class AdapterRef(msgspec.Struct, frozen=True):
    """An immutable adapter version: its digest, and the folder that holds its files."""

    digest: str
    path: str


class Sampling(msgspec.Struct, frozen=True):
    """How the next token is drawn; already validated, every default filled in.

    `seed` is always set: the front end draws one where the caller gave none. `stop_token_ids` does not hold EOS.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    """None gives none, 0 the drawn token's, k also the k likeliest tokens'."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens from `prompt_logprobs_from` on, which is at least 1: the first has none."""
    prompt_logprobs_from: int = 1


# Front end -> engine


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Generate `n` outputs from `prompt`; output i draws with `seed + i`, and the outputs share the prompt's pages.

    `deadline` is on `time.monotonic`'s clock; past it the request ends, queued or not. With `max_tokens` 0 nothing is
    generated: the prompt is computed, its log-probabilities are told, and the request ends with LENGTH.
    """

    request_id: int
    prompt: tuple[int, ...]
    sampling: Sampling
    adapter: AdapterRef | None = None
    priority: int = 0
    deadline: float | None = None
    n: int = 1
    salt: str = ""
    """Whose it is: what was computed for one salt is never found by another."""


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Ends a request wherever it is, or one of its outputs; that gets no further event. Unknown ids are ignored."""

    request_id: int
    index: int | None = None


class Load(msgspec.Struct, frozen=True, tag=True):
    """Brings a version to the device when there is room (prefetch); answered by `Loaded` or `LoadFailed`."""

    adapter: AdapterRef


class Pin(msgspec.Struct, frozen=True, tag=True):
    """Loads a version and keeps it; answered by `Loaded` or `LoadFailed`."""

    adapter: AdapterRef


class Unpin(msgspec.Struct, frozen=True, tag=True):
    digest: str


class Unload(msgspec.Struct, frozen=True, tag=True):
    """Forgets a version as soon as no request holds it."""

    digest: str


class QueryResidency(msgspec.Struct, frozen=True, tag=True):
    """Answered by `ResidencyReport` with the same `query_id`."""

    query_id: int


class Check(msgspec.Struct, frozen=True, tag=True):
    """Reads the adapter in a folder and lowers it onto the base; answered by `Checked` or `CheckFailed`."""

    check_id: int
    folder: str


Command = Submit | Abort | Load | Pin | Unpin | Unload | QueryResidency | Check


# Engine -> front end


class Started(msgspec.Struct, frozen=True, tag=True):
    """A request's first step is about to run. Times on `time.monotonic`'s clock, durations in seconds.

    `cached_tokens` of its prompt were in the KV cache already.
    """

    request_id: int
    at: float
    adapter_wait: float
    cached_tokens: int = 0


class TokenLogprob(msgspec.Struct, frozen=True):
    """Natural log-probability of a token under the model's own distribution: before bias, penalties and temperature.

    `top` holds the likeliest tokens with theirs, likeliest first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Tokens(msgspec.Struct, frozen=True, tag=True):
    """New tokens of output `index` of a request, and its end if `finish` is set. EOS and stop tokens are among them.

    `logprobs` is empty or has one entry a token; `first` tells the output's first token. A request is over when all its
    outputs are.
    """

    request_id: int
    token_ids: tuple[int, ...]
    finish: FinishReason | None = None
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    first: bool = False


class PromptLogprobs(msgspec.Struct, frozen=True, tag=True):
    """One entry for each token of the prompt from `prompt_logprobs_from` on; comes once, before the first token."""

    request_id: int
    logprobs: tuple[TokenLogprob, ...]


class Failed(msgspec.Struct, frozen=True, tag=True):
    """A request ended with an error: `code` and `reason` as in `chorus.errors`, `message` safe to send."""

    request_id: int
    code: str
    reason: str
    message: str
    retry_after_s: float | None = None


class Loaded(msgspec.Struct, frozen=True, tag=True):
    digest: str
    seconds_by_stage: tuple[tuple[str, float], ...] = ()


class LoadFailed(msgspec.Struct, frozen=True, tag=True):
    digest: str
    code: str
    reason: str
    message: str
    retry_after_s: float | None = None


class Checked(msgspec.Struct, frozen=True, tag=True):
    check_id: int
    adapter: CheckedAdapter


class CheckFailed(msgspec.Struct, frozen=True, tag=True):
    """`violations` are pairs of field and description."""

    check_id: int
    code: str
    reason: str
    message: str
    retry_after_s: float | None = None
    violations: tuple[tuple[str, str], ...] = ()


class ResidentAdapter(msgspec.Struct, frozen=True):
    """One version in memory; `tier` is "device", "host" or "loading"."""

    digest: str
    tier: str
    bytes: int
    rank_rows: int
    max_rank: int
    refs: int
    pinned: bool
    hits: int


class ResidencyReport(msgspec.Struct, frozen=True, tag=True):
    query_id: int
    adapters: tuple[ResidentAdapter, ...]
    rows_total: int
    rows_used: int
    bytes_total: int
    bytes_used: int
    kv_blocks_total: int
    kv_blocks_used: int


class StepStats(msgspec.Struct, frozen=True):
    """What one step did, and what stood where when it ended; feeds the metrics."""

    seconds: float = 0.0
    rows: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    distinct_adapters: int = 0
    kinds: int = 0
    preemptions: int = 0
    evictions: int = 0
    host_evictions: int = 0
    adapter_hits: int = 0
    loads_from_disk: int = 0
    loads_from_host: int = 0
    running: int = 0
    waiting: int = 0
    waiting_for_adapter: int = 0
    kv_usage: float = 0.0
    kv_kept: float = 0.0
    page_evictions: int = 0
    pool_usage: float = 0.0
    resident_device: int = 0
    resident_host: int = 0
    pinned: int = 0
    launches: dict[Launch, int] = {}
    """Forward passes where graphs are on; more than one in a step that failed and was tried in parts."""
    graphs: int = 0


Event = Started | PromptLogprobs | Tokens | Failed | Loaded | LoadFailed | ResidencyReport | Checked | CheckFailed


class StepEvents(msgspec.Struct, frozen=True, tag=True):
    """Everything that one turn of the engine's loop has to say; `ran` is False when no forward pass was made.

    `at` is when the turn ended, on `time.monotonic`'s clock, which all processes of a machine share.
    """

    events: tuple[Event, ...] = ()
    stats: StepStats = StepStats()
    ran: bool = False
    at: float = msgspec.field(default_factory=time.monotonic)

    @property
    def awaited(self) -> set[int | None]:
        """Requests that have something here which somebody waits for: anything but tokens in the middle of an answer.

        None stands for whatever is of no request.
        """
        return {getattr(event, "request_id", None) for event in self.events if _is_awaited(event)}


class Early(msgspec.Struct, frozen=True, tag=True):
    """Events of a turn that are told before the rest of it, which they are not in; `at` is when the turn ended."""

    events: tuple[Event, ...]
    at: float


def _is_awaited(event: Event) -> bool:
    return not isinstance(event, Tokens) or event.first or event.finish is not None
