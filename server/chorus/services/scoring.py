"""Log-probabilities of given continuations: each is one engine request that computes a prompt and generates nothing.

    prompt ─┬─ continuation 0 ─> Submit(prompt + continuation, max_tokens 0) ─> its log-probabilities from len(prompt)
            ├─ continuation 1 ─> ...
            '─ ...                all at once; the first that fails ends the others

Knows tokens; does not know adapters' names, gRPC or text.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing

from chorus.engine.messages import Sampling, TokenLogprob
from chorus.services.streams import TokenStream
from chorus.v1 import tasks_pb2

Tokens = tuple[int, ...]


async def score(
    submit: Callable[[Tokens, Sampling], TokenStream], prompt: Tokens, continuations: Sequence[Tokens]
) -> list[tasks_pb2.ContinuationScore]:
    """One score a continuation, in order. Raises what ends any of the requests, after the others were let go."""
    sampling = Sampling(max_tokens=0, prompt_logprobs=0, prompt_logprobs_from=len(prompt))
    with ExitStack() as stack:
        streams = [stack.enter_context(closing(submit(prompt + tokens, sampling))) for tokens in continuations]
        reads = [asyncio.ensure_future(_read(stream)) for stream in streams]
        try:
            results = await asyncio.gather(*reads)
        finally:
            for read in reads:
                read.cancel()
    return [_message(tokens, logprobs) for tokens, logprobs in zip(continuations, results, strict=True)]


async def _read(stream: TokenStream) -> tuple[TokenLogprob, ...]:
    logprobs: tuple[TokenLogprob, ...] = ()
    async for ready in stream:
        logprobs += ready.prompt_logprobs
    return logprobs


def _message(tokens: Tokens, logprobs: tuple[TokenLogprob, ...]) -> tasks_pb2.ContinuationScore:
    values = [entry.logprob for _, entry in zip(tokens, logprobs, strict=True)]
    return tasks_pb2.ContinuationScore(logprob=sum(values), token_logprobs=values, token_ids=tokens)
