"""Text to token ids and back, on the base's tokenizer. Knows nothing of requests, streams or gRPC.

The backend (`tokenizers`) is used directly: transformers' wrapper changes the shared tokenizer on each call, which two
threads may not do at the same time.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from chorus.errors import FailedPrecondition, InvalidArgument
from chorus.models.facts import BaseFacts
from chorus.services.validation import prompt_too_long

# About 1 ms of tokenizing (1 to 3 MB/s on one core): the most that may hold up the event loop.
INLINE_CHARS = 2000
_THREADS = 2


class TextCodec:
    """The base's tokenizer, if it has one, for use from the event loop."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast | None, facts: BaseFacts) -> None:
        self.tokenizer = tokenizer
        self._facts = facts
        self._backend: Tokenizer | None = tokenizer.backend_tokenizer if tokenizer is not None else None
        self._longest_token = 0
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
            self._longest_token = max(map(len, self._backend.get_vocab()), default=1)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="tokenize")

    async def encode(self, text: str, field: str, *, special: bool = True) -> tuple[int, ...]:
        """`text` as the base sees it; `special` adds the special tokens that the tokenizer puts around a text.

        Raises:
            FailedPrecondition: the base has no tokenizer.
            InvalidArgument: so long that it can not fit the context, whatever its tokens are.
        """
        backend = self._need(field)
        self.check_length(len(text))
        if len(text) <= INLINE_CHARS:
            return _encode(backend, text, special)
        return await asyncio.get_running_loop().run_in_executor(self._threads, _encode, backend, text, special)

    @property
    def longest_text(self) -> int:
        """Characters that fit the context at most, whatever their tokens are."""
        return self._facts.context_length * self._longest_token

    def check_length(self, characters: int) -> None:
        """Raises InvalidArgument for a text that can not fit the context, whatever its tokens are."""
        if characters > self.longest_text:
            raise prompt_too_long(f"{characters} characters", self._facts)

    def decode(self, token_ids: Sequence[int], field: str) -> str:
        """Raises FailedPrecondition without a tokenizer, InvalidArgument for an id outside the vocabulary."""
        backend = self._need(field)
        size = self._facts.vocab_size
        if len(token_ids) > self._facts.context_length:
            raise InvalidArgument(f"{field}: at most {self._facts.context_length} ids", field=field)
        if token_ids and max(token_ids) >= size:
            raise InvalidArgument(f"{field}: token ids must be below {size}", field=field)
        text: str = backend.decode(list(token_ids), skip_special_tokens=False)
        return text

    def require_tokenizer(self, field: str) -> PreTrainedTokenizerFast:
        """The tokenizer. Raises FailedPrecondition if the base has none."""
        if self.tokenizer is None:
            raise _no_tokenizer(field)
        return self.tokenizer

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _need(self, field: str) -> Tokenizer:
        if self._backend is None:
            raise _no_tokenizer(field)
        return self._backend


def _encode(backend: Tokenizer, text: str, special: bool) -> tuple[int, ...]:
    return tuple(backend.encode(text, add_special_tokens=special).ids)


def _no_tokenizer(field: str) -> FailedPrecondition:
    text = f"{field}: this base model has no tokenizer; send token ids"
    return FailedPrecondition(text, reason="NO_TOKENIZER", field=field)
