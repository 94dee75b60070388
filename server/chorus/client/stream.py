"""An answer on its way, read as it comes: `Stream` blocks, `AsyncStream` awaits; `answer.Answer` does the rest."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Self

import grpc

from chorus.client.answer import Answer
from chorus.client.results import Completion, Delta
from chorus.errors import ChorusError


class _AnyStream:
    """What both streams know: the answer so far, how to end it, and what its errors become."""

    def __init__(self, call: Any, answer: Answer, *, to_error: Callable[[grpc.RpcError], ChorusError]) -> None:
        self._call = call
        self._answer = answer
        self._to_error = to_error
        self._cancelled = False
        self._has_tokenizer = False

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
        return self._answer.result(has_tokenizer=self._has_tokenizer)


class Stream(_AnyStream):
    """An answer as it comes. Iterate for its deltas; `cancel()` ends it; `result` holds all of it after the end.

    As a context manager it cancels on exit, so the server never works for a reader that left. One reader only;
    `cancel()` may come from any thread. Iteration raises a `ChorusError` when the answer breaks off, and simply ends
    after `cancel()`.
    """

    def __init__(
        self,
        call: "grpc._CallIterator[Any]",
        answer: Answer,
        *,
        to_error: Callable[[grpc.RpcError], ChorusError],
        has_tokenizer: Callable[[], bool],
    ) -> None:
        super().__init__(call, answer, to_error=to_error)
        self._ask_tokenizer = has_tokenizer

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        try:
            response = next(self._call)
        except StopIteration:
            if not self._cancelled:
                self._answer.refuse_incomplete()
            raise
        except grpc.RpcError as error:
            if self._cancelled:
                raise StopIteration from None
            raise self._to_error(error) from None
        delta = self._answer.add(response)
        if self._answer.ended:
            try:
                self._has_tokenizer = self._answer.shows_tokenizer or self._ask_tokenizer()
            except ChorusError:
                # The answer is whole; a server that drains by now finishes streams but takes no questions.
                self._has_tokenizer = False
        return delta

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()


class AsyncStream(_AnyStream):
    """As `Stream`, with `async for` and `async with`; belongs to one event loop."""

    def __init__(
        self,
        call: "grpc.aio.UnaryStreamCall[Any, Any]",
        answer: Answer,
        *,
        to_error: Callable[[grpc.RpcError], ChorusError],
        has_tokenizer: Callable[[], Awaitable[bool]],
    ) -> None:
        super().__init__(call, answer, to_error=to_error)
        self._ask_tokenizer = has_tokenizer

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        if self._cancelled:
            raise StopAsyncIteration
        try:
            response = await self._call.read()
        except grpc.RpcError as error:
            raise self._to_error(error) from None
        if response is grpc.aio.EOF:
            self._answer.refuse_incomplete()
            raise StopAsyncIteration
        delta = self._answer.add(response)
        if self._answer.ended:
            try:
                self._has_tokenizer = self._answer.shows_tokenizer or await self._ask_tokenizer()
            except ChorusError:
                # As in `Stream`.
                self._has_tokenizer = False
        return delta

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()
