"""What crosses the line between the front end and the engine: flat, frozen, serialisable.

Commands go in through `EngineThread.send`; one `StepEvents` a step comes back. Nothing here holds a tensor, a socket or
a lock, so the engine can move into a process of its own without a change to either side.
"""

import time
from dataclasses import dataclass, field
from enum import Enum


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"
    STOP_STRING = "stop_string"
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """An immutable adapter version: its digest, and the folder that holds its files."""

    digest: str
    path: str


@dataclass(frozen=True, slots=True)
class Sampling:
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


@dataclass(frozen=True, slots=True)
class Submit:
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


@dataclass(frozen=True, slots=True)
class Abort:
    """Ends a request wherever it is, or one of its outputs; that gets no further event. Unknown ids are ignored."""

    request_id: int
    index: int | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """Brings a version to the device when there is room (prefetch); answered by `Loaded` or `LoadFailed`."""

    adapter: AdapterRef


@dataclass(frozen=True, slots=True)
class Pin:
    """Loads a version and keeps it; answered by `Loaded` or `LoadFailed`."""

    adapter: AdapterRef


@dataclass(frozen=True, slots=True)
class Unpin:
    digest: str


@dataclass(frozen=True, slots=True)
class Unload:
    """Forgets a version as soon as no request holds it."""

    digest: str


@dataclass(frozen=True, slots=True)
class QueryResidency:
    """Answered by `ResidencyReport` with the same `query_id`."""

    query_id: int


Command = Submit | Abort | Load | Pin | Unpin | Unload | QueryResidency


# Engine -> front end


@dataclass(frozen=True, slots=True)
class Started:
    """A request's first step is about to run. Times on `time.monotonic`'s clock, durations in seconds."""

    request_id: int
    at: float
    adapter_wait: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log-probability of a token under the model's own distribution: before bias, penalties and temperature.

    `top` holds the likeliest tokens with theirs, likeliest first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Tokens:
    """New tokens of output `index` of a request, and its end if `finish` is set. EOS and stop tokens are among them.

    `logprobs` is empty or has one entry a token. A request is over when all its outputs are.
    """

    request_id: int
    token_ids: tuple[int, ...]
    finish: FinishReason | None = None
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """One entry for each token of the prompt from `prompt_logprobs_from` on; comes once, before the first token."""

    request_id: int
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Failed:
    """A request ended with an error: `code` and `reason` as in `chorus.errors`, `message` safe to send."""

    request_id: int
    code: str
    reason: str
    message: str
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    digest: str
    seconds_by_stage: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class LoadFailed:
    digest: str
    code: str
    reason: str
    message: str
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class ResidentAdapter:
    """One version in memory; `tier` is "device", "host" or "loading"."""

    digest: str
    tier: str
    bytes: int
    rank_rows: int
    max_rank: int
    refs: int
    pinned: bool
    hits: int


@dataclass(frozen=True, slots=True)
class ResidencyReport:
    query_id: int
    adapters: tuple[ResidentAdapter, ...]
    rows_total: int
    rows_used: int
    bytes_total: int
    bytes_used: int
    kv_blocks_total: int
    kv_blocks_used: int


@dataclass(frozen=True, slots=True)
class StepStats:
    """What one step did, and what stood where when it ended; feeds the metrics."""

    seconds: float = 0.0
    rows: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    distinct_adapters: int = 0
    kinds: int = 0
    preemptions: int = 0
    evictions: int = 0
    adapter_hits: int = 0
    running: int = 0
    waiting: int = 0
    waiting_for_adapter: int = 0
    kv_usage: float = 0.0
    pool_usage: float = 0.0
    resident_device: int = 0
    resident_host: int = 0
    pinned: int = 0


Event = Started | PromptLogprobs | Tokens | Failed | Loaded | LoadFailed | ResidencyReport


@dataclass(frozen=True, slots=True)
class StepEvents:
    """Everything that one turn of the engine's loop has to say; `ran` is False when no forward pass was made.

    `at` is when the turn ended, on `time.monotonic`'s clock.
    """

    events: tuple[Event, ...] = ()
    stats: StepStats = field(default_factory=StepStats)
    ran: bool = False
    at: float = field(default_factory=time.monotonic)
