"""One output of a request inside the engine: its tokens, how many of them are in the KV cache, and where.

    tokens   [ prompt ............................ | output ............ ]
    cache    [ computed ............... |  remaining, 1 while decoding   ]
    blocks   [ 7 ][ 2 ][ 9 ][ 4 ]                    the block table, page by page

Knows nothing of the text, of streams or of the device. The scheduler and the pool are the only ones that change it.
"""

from dataclasses import dataclass, field
from itertools import islice

from msgspec.structs import replace

from chorus.engine.messages import AdapterRef, FinishReason, Sampling, Submit, TokenLogprob
from chorus.engine.token_counts import TokenCounts

NO_SLOT = -1
SEEDS = 2**64

Key = tuple[int, int]
"""A request's id and the index of its output."""


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt and what has been generated from it. Times are seconds on `time.monotonic`'s clock."""

    request_id: int
    prompt: tuple[int, ...]
    sampling: Sampling
    adapter: AdapterRef | None = None
    priority: int = 0
    """Smaller runs earlier."""
    deadline: float | None = None
    arrival: float = 0.0
    index: int = 0
    """Which of the request's outputs it is."""
    salt: str = ""
    """Only sequences of the same salt share pages."""

    output: list[int] = field(default_factory=list)
    computed: int = 0
    """Tokens whose keys and values are in the cache."""
    blocks: list[int] = field(default_factory=list)
    page_keys: list[bytes] = field(default_factory=list)
    """What its first full pages hold, as far as anybody asked; see `chorus.engine.page_keys`."""
    slot: int = NO_SLOT
    """The adapter's slot on the device while the sequence runs; `NO_SLOT` for the base model, and in the queue."""
    started: bool = False
    """It has run at least once; it may be back in the queue since."""
    adapter_wait_since: float | None = None
    adapter_wait: float = 0.0
    """Seconds in the queue during which only its adapter was missing."""
    ticket: int = 0
    """Position in the order of arrival; set by the scheduler, as is `max_length`."""
    max_length: int = 0
    """Tokens, prompt included, at which it ends: the caller's limit, the context's or the cache's."""
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of the prompt's tokens from `sampling.prompt_logprobs_from` on, as far as they are known; kept when preempted."""
    counts: TokenCounts | None = None
    """How often it has which token, once a penalty needs it; kept up to date by `chorus.engine.penalties`."""
    key: Key = field(init=False)
    """What it is found by."""

    def __post_init__(self) -> None:
        self.key = self.request_id, self.index

    @property
    def length(self) -> int:
        """All tokens, prompt and output."""
        return len(self.prompt) + len(self.output)

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be sampled: 1 while decoding."""
        return len(self.prompt) + len(self.output) - self.computed

    @property
    def first_needed(self) -> int:
        """The first position whose row is wanted, wherever the keys and values before it come from.

        That of its last token, or the first that has to tell of its prompt.
        """
        untold = self.untold_rows(0, self.length)
        return untold.start if untold else self.length - 1

    def untold_rows(self, start: int, count: int) -> range:
        """Positions of `[start, start + count)` whose logits give the next log-probabilities of the prompt.

        Row p tells token p + 1. Empty for what is known already, so a chunk that is computed again tells nothing twice.
        """
        if self.sampling.prompt_logprobs is None:
            return range(0)
        first = self.sampling.prompt_logprobs_from - 1 + len(self.prompt_logprobs)
        return range(max(start, first), min(start + count, len(self.prompt) - 1))

    def token_slice(self, start: int, count: int) -> list[int]:
        """Tokens `[start, start + count)` of prompt and output together, in O(count)."""
        from_output = start - len(self.prompt)
        if from_output >= 0:
            return self.output[from_output : from_output + count]
        tokens = list(self.prompt[start : start + count])
        tokens.extend(islice(self.output, count - len(tokens)))
        return tokens

    def finish_reason(self, eos_token_ids: frozenset[int]) -> FinishReason | None:
        """Why it ends with the last token of its output, if it does. The first `min_tokens` tokens stop nothing."""
        sampling, token = self.sampling, self.output[-1]
        if len(self.output) > sampling.min_tokens:
            if token in eos_token_ids and not sampling.ignore_eos:
                return FinishReason.STOP
            if token in sampling.stop_token_ids:
                return FinishReason.STOP
        return FinishReason.LENGTH if self.length >= self.max_length else None


def outputs_of(submit: Submit, now: float) -> list[Sequence]:
    """The sequences of a request that arrived `now`: output i draws with `seed + i`; the first one reads the prompt."""
    asked = submit.sampling
    return [
        Sequence(
            request_id=submit.request_id,
            prompt=submit.prompt,
            sampling=asked if index == 0 else replace(asked, seed=(asked.seed + index) % SEEDS, prompt_logprobs=None),
            adapter=submit.adapter,
            priority=submit.priority,
            deadline=submit.deadline,
            arrival=now,
            index=index,
            salt=submit.salt,
        )
        for index in range(submit.n)
    ]
