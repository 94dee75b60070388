"""One request and its answer on the way: building `GenerateRequest`, reading the stream of `GenerateResponse`."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, TypedDict

import grpc

from chorus.client import wire
from chorus.client.names import expand
from chorus.client.results import Completion, Delta
from chorus.errors import ChorusError, InternalError, InvalidArgument
from chorus.v1 import generate_pb2


class Sampling(TypedDict, total=False):
    """How tokens are drawn, as vLLM means each name; None and absent both leave it to the server."""

    max_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int | None
    stop: Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None


class Stream:
    """An answer as it comes. Iterate for its deltas; `cancel()` ends it; `result` holds all of it after the end.

    As a context manager it cancels on exit, so the server never works for a reader that left. One reader only;
    `cancel()` may come from any thread. Iteration raises a `ChorusError` when the answer breaks off, and simply ends
    after `cancel()`.
    """

    def __init__(
        self,
        call: "grpc._CallIterator[generate_pb2.GenerateResponse]",
        *,
        to_error: Callable[[grpc.RpcError], ChorusError],
        has_tokenizer: Callable[[], bool],
    ) -> None:
        self._call = call
        self._to_error = to_error
        self._has_tokenizer = has_tokenizer
        self._token_ids: list[int] = []
        self._text: list[str] = []
        self._last: generate_pb2.GenerateResponse | None = None
        self._cancelled = False
        self._result: Completion | None = None

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        try:
            response = next(self._call)
        except StopIteration:
            if not self._cancelled:
                self._refuse_incomplete()
            raise
        except grpc.RpcError as error:
            if self._cancelled:
                raise StopIteration from None
            raise self._to_error(error) from None
        self._token_ids += response.token_ids
        self._text.append(response.text)
        self._last = response
        return Delta(tuple(response.token_ids), response.text, wire.finish_reason(response.finish_reason))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Ends the answer here; the server stops working on it. Nothing happens if it has ended."""
        self._cancelled = True
        self._call.cancel()

    @property
    def result(self) -> Completion:
        """The whole answer.

        Raises:
            RuntimeError: it has not ended yet, was cancelled, or failed.
        """
        if self._result is None:
            last = self._last
            reason = wire.finish_reason(last.finish_reason) if last is not None else None
            if last is None or reason is None:
                raise RuntimeError("the answer has not ended: iterate the stream first")
            self._result = Completion(
                token_ids=tuple(self._token_ids),
                text=self._whole_text(),
                finish_reason=reason,
                usage=wire.usage(last.usage),
                timing=wire.timing(last.timing),
                version=last.adapter_version,
            )
        return self._result

    def _whole_text(self) -> str | None:
        # Text at all means a tokenizer; only an empty one needs to ask.
        text = "".join(self._text)
        try:
            return text if text or self._has_tokenizer() else None
        except ChorusError:
            # The answer is whole; a server that drains by now finishes streams but takes no questions.
            return None

    def _refuse_incomplete(self) -> None:
        if self._last is None or not self._last.finish_reason:
            raise InternalError("the stream ended without a finish reason", reason="INCOMPLETE_STREAM")


def build_request(prompt: str | Sequence[int], adapter: str, sampling: Sampling) -> generate_pb2.GenerateRequest:
    """Builds the message; whatever protobuf can not hold is refused by the field's name.

    Raises:
        InvalidArgument: a value of the wrong type or size.
        TypeError: a parameter that is not in `Sampling`.
    """
    unknown = sampling.keys() - Sampling.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown sampling parameters: {', '.join(sorted(unknown))}")
    request = generate_pb2.GenerateRequest()
    _set(request, "adapter", expand(adapter))
    if isinstance(prompt, str):
        _set(request, "text", prompt)
    else:
        request.token_ids.SetInParent()
        _set(request.token_ids, "ids", prompt, path="token_ids")
    for name, value in sampling.items():
        if value is not None:
            _set(request.sampling, name, value, path=f"sampling.{name}")
    return request


def _set(
    message: generate_pb2.GenerateRequest | generate_pb2.SamplingParams | generate_pb2.TokenIds,
    name: str,
    value: Any,
    *,
    path: str | None = None,
) -> None:
    path = path or name
    repeated = hasattr(getattr(message, name), "extend")
    try:
        if not repeated:
            setattr(message, name, value)
        elif isinstance(value, str):
            raise TypeError("takes a list, not one text")
        else:
            getattr(message, name).extend(value)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"{path}: {error}", field=path) from None
