"""A completion: one stream of tokens as the messages of one Generate call: text, stop strings, usage and timing.

    Ready ─> each output: tokens ─> its detokenizer ─> text, cut at a stop string ─> one message an output

Each of the n outputs has its own text, stop strings and end; a stop string ends its own output only.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence

from google.protobuf.duration_pb2 import Duration

from chorus.engine.messages import FinishReason, TokenLogprob
from chorus.services.detokenizer import Detokenizer
from chorus.services.streams import OutputTokens, TokenStream
from chorus.services.text import TextCodec
from chorus.v1 import generate_pb2

FINISH_REASONS = {
    FinishReason.STOP: generate_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generate_pb2.FINISH_REASON_LENGTH,
    FinishReason.STOP_STRING: generate_pb2.FINISH_REASON_STOP_STRING,
    FinishReason.ABORTED: generate_pb2.FINISH_REASON_ABORTED,
}
# With 20 likeliest tokens each.
_AT_ONCE = 128


class Completion:
    """Turns tokens into messages; the last one of the stream carries usage and timing."""

    def __init__(
        self,
        stream: TokenStream,
        prompt: Sequence[int],
        *,
        n: int,
        text: TextCodec,
        stop: Sequence[str],
        min_tokens: int,
        version_name: str,
    ) -> None:
        self._stream = stream
        self._prompt_tokens = len(prompt)
        self._completion_tokens = 0
        self._version_name = version_name
        tokenizer = text.tokenizer
        self._detokenizers = (
            [Detokenizer(tokenizer, prompt, stop, min_tokens) for _ in range(n)] if tokenizer is not None else None
        )

    async def messages(self) -> AsyncIterator[generate_pb2.GenerateResponse]:
        """The first message comes with the first token. Raises what ended the stream."""
        first = True
        async for ready in self._stream:
            # All of them before the first is written: stop strings end their outputs at once, however slow the reader.
            messages = [self._message(output) for output in ready.outputs]
            if first:
                messages[0].adapter_version = self._version_name
                await _add_prompt_logprobs(messages[0], ready.prompt_logprobs)
            if self._stream.over:
                self._stream.close()
                self._sum_up(messages[-1])
            first = False
            for message in messages:
                yield message

    def _message(self, output: OutputTokens) -> generate_pb2.GenerateResponse:
        """What one output has new."""
        token_ids, text, finish = output.token_ids, "", output.finish
        if self._detokenizers is not None:
            detokenizer = self._detokenizers[output.index]
            delta = detokenizer.push(_visible(output))
            text = delta.text
            if delta.stopped:
                token_ids = token_ids[: delta.consumed]
            elif finish is not None:
                text += detokenizer.finish()
            if detokenizer.stopped:
                finish = FinishReason.STOP_STRING
                self._stream.end_output(output.index, finish)
        self._completion_tokens += len(token_ids)
        message = generate_pb2.GenerateResponse(index=output.index, token_ids=token_ids, text=text)
        if output.logprobs:
            message.logprobs.extend(map(_logprobs_message, output.logprobs[: len(token_ids)]))
        if finish is not None:
            message.finish_reason = FINISH_REASONS[finish]
        return message

    def _sum_up(self, message: generate_pb2.GenerateResponse) -> None:
        now = time.monotonic()
        stream = self._stream
        arrived_at, started_at = stream.arrived_at, stream.started_at
        message.adapter_version = self._version_name
        message.usage.prompt_tokens = self._prompt_tokens
        message.usage.cached_tokens = stream.cached_tokens
        message.usage.completion_tokens = self._completion_tokens
        _set(message.timing.queue, (now if started_at is None else started_at) - arrived_at)
        _set(message.timing.adapter_load, stream.adapter_wait)
        _set(message.timing.first_token, (stream.first_token_at or now) - arrived_at)
        _set(message.timing.total, now - arrived_at)


async def _add_prompt_logprobs(message: generate_pb2.GenerateResponse, entries: Sequence[TokenLogprob]) -> None:
    """In pieces of about a millisecond, between which the event loop serves the others."""
    for start in range(0, len(entries), _AT_ONCE):
        message.prompt_logprobs.extend(map(_logprobs_message, entries[start : start + _AT_ONCE]))
        await asyncio.sleep(0)


def _logprobs_message(entry: TokenLogprob) -> generate_pb2.TokenLogprobs:
    return generate_pb2.TokenLogprobs(logprob=entry.logprob, top=dict(entry.top))


def _visible(output: OutputTokens) -> Iterable[int]:
    """The tokens that have text: all but the one that ended it, end-of-sequence or one of `stop_token_ids`."""
    return output.token_ids[:-1] if output.finish is FinishReason.STOP else output.token_ids


def _set(duration: Duration, seconds: float) -> None:
    duration.FromNanoseconds(max(int(seconds * 1e9), 0))
