"""A completion: one stream of tokens as the messages of one Generate call: text, stop strings, usage and timing."""

import time
from collections.abc import AsyncIterator, Sequence

from google.protobuf.duration_pb2 import Duration

from chorus.engine.messages import FinishReason
from chorus.services.detokenizer import Detokenizer
from chorus.services.streams import TokenBatch, TokenStream
from chorus.services.text import TextCodec
from chorus.v1 import generate_pb2

FINISH_REASONS = {
    FinishReason.STOP: generate_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generate_pb2.FINISH_REASON_LENGTH,
    FinishReason.STOP_STRING: generate_pb2.FINISH_REASON_STOP_STRING,
    FinishReason.ABORTED: generate_pb2.FINISH_REASON_ABORTED,
}


class Completion:
    """Turns batches of tokens into messages; `messages` ends with the one that carries the finish reason."""

    def __init__(
        self,
        stream: TokenStream,
        prompt: Sequence[int],
        *,
        text: TextCodec,
        stop: Sequence[str],
        min_tokens: int,
        version_name: str,
    ) -> None:
        self._stream = stream
        self._prompt_tokens = len(prompt)
        self._completion_tokens = 0
        self._version_name = version_name
        self._detokenizer = (
            Detokenizer(text.tokenizer, prompt, stop, min_tokens) if text.tokenizer is not None else None
        )

    async def messages(self) -> AsyncIterator[generate_pb2.GenerateResponse]:
        """The first message comes with the first token. Raises what ended the stream."""
        first = True
        async for batch in self._stream:
            message, finish = self._message(batch)
            if first or finish is not None:
                message.adapter_version = self._version_name
            first = False
            if finish is not None:
                self._stream.close(finish)
                self._sum_up(message, finish)
                yield message
                return
            yield message

    def _message(self, batch: TokenBatch) -> tuple[generate_pb2.GenerateResponse, FinishReason | None]:
        """One batch as a message, and the reason if it is the last one."""
        token_ids, text, finish = batch.token_ids, "", batch.finish
        if self._detokenizer is not None:
            delta = self._detokenizer.push(self._visible(batch))
            text = delta.text
            if delta.stopped:
                token_ids, finish = token_ids[: delta.consumed], FinishReason.STOP_STRING
            elif finish is not None:
                text += self._detokenizer.finish()
                finish = FinishReason.STOP_STRING if self._detokenizer.stopped else finish
        self._completion_tokens += len(token_ids)
        return generate_pb2.GenerateResponse(token_ids=token_ids, text=text), finish

    def _visible(self, batch: TokenBatch) -> list[int]:
        """The tokens that have text: all but the one that ended it, end-of-sequence or one of `stop_token_ids`."""
        return list(batch.token_ids[:-1] if batch.finish is FinishReason.STOP else batch.token_ids)

    def _sum_up(self, message: generate_pb2.GenerateResponse, finish: FinishReason) -> None:
        now = time.monotonic()
        stream = self._stream
        arrived_at, started_at = stream.arrived_at, stream.started_at
        message.finish_reason = FINISH_REASONS[finish]
        message.usage.prompt_tokens = self._prompt_tokens
        message.usage.completion_tokens = self._completion_tokens
        _set(message.timing.queue, (now if started_at is None else started_at) - arrived_at)
        _set(message.timing.adapter_load, stream.adapter_wait)
        _set(message.timing.first_token, (stream.first_token_at or now) - arrived_at)
        _set(message.timing.total, now - arrived_at)


def _set(duration: Duration, seconds: float) -> None:
    duration.FromNanoseconds(max(int(seconds * 1e9), 0))
