"""What the engine takes in at all: prompts that fit, as many as the queue holds, deadlines that can be met.

A refusal at once is worth more to a caller than the same answer later, and costs the others nothing. It is only given
where it is certain enough: a prompt that fits nowhere, a queue that is full, or a first token that would come too late
even if everything went twice as fast as it does. How many tokens an answer will have, nobody knows; so a deadline that
the first token can meet is taken.
"""

from collections.abc import Iterable
from typing import NamedTuple

from chorus.engine.kv_cache import BlockPool
from chorus.engine.page_keys import PageKeys
from chorus.engine.sequence import Sequence
from chorus.engine.step_cost import StepCost
from chorus.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, ResourceExhausted

QUEUE_RETRY_S = 1.0
# What a step costs is an estimate, and whoever is ahead may still leave.
BENEFIT_OF_DOUBT = 2.0
# Of the queue, at most; about a millisecond. What is behind that does not count against anybody.
PAGES_LOOKED_AT = 4096


class Limits(NamedTuple):
    """Tokens of the context and of the whole KV cache; sequences that may wait."""

    context_length: int
    cache_tokens: int
    max_queue: int

    @property
    def longest(self) -> int:
        """Tokens of a sequence, at most."""
        return min(self.context_length, self.cache_tokens)

    def check_prompt(self, prompt: int, max_tokens: int) -> None:
        """Raises InvalidArgument or FailedPrecondition if a prompt leaves no room for a token that is asked for."""
        limit = self.longest - min(max_tokens, 1)
        if prompt <= limit:
            return
        message = f"the prompt has {prompt} tokens, the limit is {limit}"
        if prompt > self.context_length - min(max_tokens, 1):
            raise InvalidArgument(message, field="prompt")
        raise FailedPrecondition(f"{message}: the KV cache is no larger", reason="KV_CACHE_TOO_SMALL")

    def check_room(self, waiting: int, outputs: int) -> None:
        """Raises FailedPrecondition or ResourceExhausted if the queue does not take so many more sequences."""
        if outputs > self.max_queue:
            message = f"{outputs} outputs do not fit into the queue, which holds {self.max_queue}; ask for fewer"
            raise FailedPrecondition(message, reason="QUEUE_TOO_SMALL")
        if waiting + outputs > self.max_queue:
            message = (
                f"the queue holds {self.max_queue} and {waiting} are waiting: no room for {outputs} more; "
                "try again later, or another server"
            )
            raise ResourceExhausted(message, reason="QUEUE_FULL", retry_after_s=QUEUE_RETRY_S)


def tokens_to_compute(sequences: Iterable[Sequence], keys: PageKeys, pool: BlockPool) -> int:
    """Tokens that must be computed before each of these, one after the other, has a token: never more than it takes.

    A page that is there, or that an earlier one of them computes, is not computed again.
    """
    seen: set[bytes] = set()
    tokens = looked_at = 0
    for seq in sequences:
        pages = keys.of(seq, seq.first_needed // pool.block_size)
        not_begun = pages[pool.blocks_for(seq.computed) :]
        known = sum(key in seen or bool(pool.find([key])) for key in not_begun)
        tokens += seq.remaining - known * pool.block_size
        seen.update(pages)
        looked_at += len(pages) + 1
        if looked_at > PAGES_LOOKED_AT:
            break
    return tokens


def can_be_met(left: float, cost: StepCost, tokens: int) -> bool:
    """Whether so many tokens are computed in the seconds `left`, at twice the measured rate, if one is known."""
    return not cost.knows_tokens or tokens * cost.per_token / BENEFIT_OF_DOUBT <= left


def check_deadline(left: float, cost: StepCost, *, ahead: int, own: int) -> None:
    """Raises if a request can not have its first token in the seconds `left`: `own` tokens, `ahead` before them.

    Raises:
        DeadlineExceeded: not even alone.
        ResourceExhausted: not behind those who are ahead of it; says when they will be done.
    """
    if not can_be_met(left, cost, own):
        message = f"the prompt alone takes {own * cost.per_token:.2g} s, the deadline is in {left:.2g} s"
        raise DeadlineExceeded(f"{message}: allow more time, or send less", reason="DEADLINE_TOO_SOON")
    if not can_be_met(left, cost, ahead + own):
        wait = ahead * cost.per_token
        message = f"those ahead take {wait:.2g} s, the deadline is in {left:.2g} s: try again later, or another server"
        raise ResourceExhausted(message, reason="DEADLINE_UNREACHABLE", retry_after_s=max(wait, QUEUE_RETRY_S))
