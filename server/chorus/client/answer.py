"""One answer while it comes: puts the messages of up to n outputs together. Does no I/O."""

from dataclasses import dataclass, field

from chorus.client import wire
from chorus.client.results import Completion, Delta, Output, TokenLogprob
from chorus.errors import InternalError
from chorus.v1 import generate_pb2


@dataclass(slots=True)
class _Partial:
    """One output so far."""

    token_ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None

    def output(self, *, has_tokenizer: bool) -> Output:
        text = "".join(self.text)
        return Output(
            token_ids=tuple(self.token_ids),
            text=text if text or has_tokenizer else None,
            finish_reason=self.finish_reason or "",
            logprobs=tuple(self.logprobs),
        )


class Answer:
    """Takes the messages of one request with `add`; `result` is the whole once `ended`."""

    def __init__(self, request: generate_pb2.GenerateRequest) -> None:
        self._outputs = [_Partial() for _ in range(max(1, request.sampling.n))]
        # A text that the server took proves a tokenizer.
        self._text_asked = request.WhichOneof("prompt") != "token_ids"
        self._prompt_logprobs: tuple[TokenLogprob, ...] = ()
        self._last: generate_pb2.GenerateResponse | None = None

    @property
    def ended(self) -> bool:
        return all(output.finish_reason is not None for output in self._outputs)

    @property
    def shows_tokenizer(self) -> bool:
        """Whether the answer itself proves that the base has a tokenizer."""
        return self._text_asked or any(text for output in self._outputs for text in output.text)

    def add(self, response: generate_pb2.GenerateResponse) -> Delta:
        """Takes the next message.

        Raises:
            InternalError: it goes on with an output that was not asked for.
        """
        if response.index >= len(self._outputs):
            raise InternalError(f"the server sent output {response.index} of {len(self._outputs)}", reason="BAD_INDEX")
        delta = Delta(
            token_ids=tuple(response.token_ids),
            text=response.text,
            finish_reason=wire.finish_reason(response.finish_reason),
            index=response.index,
            logprobs=wire.logprobs(response.logprobs),
        )
        output = self._outputs[delta.index]
        output.token_ids += delta.token_ids
        output.text.append(delta.text)
        output.logprobs += delta.logprobs
        output.finish_reason = delta.finish_reason or output.finish_reason
        if response.prompt_logprobs:
            self._prompt_logprobs = wire.logprobs(response.prompt_logprobs)
        self._last = response
        return delta

    def refuse_incomplete(self) -> None:
        """Raises InternalError where the stream has ended and the answer has not."""
        if not self.ended:
            raise InternalError("the stream ended without a finish reason", reason="INCOMPLETE_STREAM")

    def result(self, *, has_tokenizer: bool) -> Completion:
        """Gives the whole answer.

        Raises:
            RuntimeError: it has not ended yet, was cancelled, or failed.
        """
        if self._last is None or not self.ended:
            raise RuntimeError("the answer has not ended: iterate the stream first")
        return Completion(
            outputs=tuple(output.output(has_tokenizer=has_tokenizer) for output in self._outputs),
            usage=wire.usage(self._last.usage),
            timing=wire.timing(self._last.timing),
            version=self._last.adapter_version,
            prompt_logprobs=self._prompt_logprobs,
        )
