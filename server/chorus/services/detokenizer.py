"""One stream's token ids as text, as they come: no half characters, nothing of a stop string.

Not `tokenizers.decoders.DecodeStream`, which this started from and whose idea it keeps (decode a short window, cut off
what is known): on ids that are no valid UTF-8 its window grows without end (4,000 bad tokens hold the event loop for
1.8 s; here 40 ms), special tokens do the same, a character that only looked finished breaks it for good ("Invalid
prefix encountered"), a prompt that ends within a character comes out again as output, and it has no end of stream.

Which text comes out, D being `tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True)`:

- Byte-level BPE: exactly D(output), whatever the ids are, with U+FFFD where the bytes are no UTF-8.
- Metaspace and sentencepiece decoders, which drop a leading space: D(prompt + output) without D(prompt), so that the
  space between prompt and output stays. If the prompt ends within a character, or in U+FFFD, D(output).
- With byte fallback too, except where a run of byte tokens is no UTF-8 as a whole. D turns the whole run into U+FFFD;
  here what was valid when it came stays as it was sent.

Knows one stream; does not know messages, finish reasons or EOS.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character has at most 4 bytes, so at most 4 tokens; 3 of them may be here already.
_CHARACTER_TOKENS = 4
_INCOMPLETE = 3
# Half of them, which stay when the oldest are dropped, hold three incomplete characters and the end of one before.
_PENDING_TOKENS = 24


class Delta(NamedTuple):
    """What one push made of its tokens: new text, whether a stop string ended it, and how many tokens that took.

    `consumed` is the number of pushed tokens up to the one that completed the stop string; all of them without a match.
    """

    text: str
    stopped: bool
    consumed: int


class Detokenizer:
    """Turns one stream of token ids into text. Costs a few microseconds per token, whatever came before.

    `stop` strings end the text before the one that is complete first; of several complete at once the longest counts.
    The first `min_tokens` tokens complete none. Raises ValueError for an empty stop string.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        prompt_ids: Sequence[int],
        stop: Sequence[str] = (),
        min_tokens: int = 0,
    ) -> None:
        self._window = _Window(tokenizer, prompt_ids)
        self._stop = _StopStrings(stop)
        self._min_tokens = min_tokens
        self._tokens = 0

    @property
    def stopped(self) -> bool:
        """A stop string has ended the text; nothing comes any more."""
        return self._stop.found

    def push(self, token_ids: Iterable[int]) -> Delta:
        """The text that these tokens make certain. How tokens are spread over pushes changes nothing."""
        text: list[str] = []
        consumed = 0
        for token_id in token_ids:
            if self.stopped:
                break
            consumed += 1
            text.append(self._cut(self._window.push(token_id), 1))
        return Delta("".join(text), self.stopped, consumed)

    def finish(self) -> str:
        """The text that was held back, once no token follows; it may still be cut at a stop string (see `stopped`)."""
        if self.stopped:
            return ""
        return self._cut(self._window.finish(), 0) + self._stop.finish()

    def _cut(self, text: str, tokens: int) -> str:
        self._tokens += tokens
        return self._stop.push(text, armed=self._tokens > self._min_tokens)


class _Window:
    """Decodes new tokens beside the few before them.

        ... t4 t5 t6 | t7 t8 t9 |
             context   pending         D(context) is out, of D(pending) the first `sent` characters are

    U+FFFD at the end of the text may be a character that is not complete. With byte-level tokens that is one U+FFFD,
    with byte fallback one per byte, so three are held back. A pending token can hold the end of one character and the
    beginning of the next, so that pending tokens may never end between characters; then the oldest are dropped.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", prompt_ids: Sequence[int]) -> None:
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self._silent = _special_ids(tokenizer)
        self._context: list[int] = []
        self._pending: list[int] = []
        self._sent = 0
        self._start(self._prompt_context(prompt_ids))

    def push(self, token_id: int) -> str:
        if not self._has_text(token_id):
            return ""
        self._pending.append(token_id)
        text = self._pending_text()
        held = min(len(text) - len(text.rstrip(REPLACEMENT)), _INCOMPLETE)
        new, self._sent = text[self._sent : len(text) - held], max(self._sent, len(text) - held)
        if not held:
            self._start(self._pending)
        elif len(self._pending) == _PENDING_TOKENS:
            self._drop_oldest(text)
        return new

    def finish(self) -> str:
        new = self._pending_text()[self._sent :]
        self._start([])
        return new

    def _pending_text(self) -> str:
        text = self._decode(self._context + self._pending)
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        # They change what is out already. Only bytes that are not valid, or not complete, do, and need no context.
        return self._decode(self._pending)

    def _drop_oldest(self, text: str) -> None:
        """Forgets pending tokens whose text is out. What is left may begin within a character, and gives U+FFFD there,
        but ends as before; with byte fallback it must not have become valid."""
        half = _PENDING_TOKENS // 2
        left = {count: self._decode(self._pending[count:]) for count in range(half, 0, -1)}
        same = (count for count in left if text.endswith(left[count].lstrip(REPLACEMENT)))
        count = next(same, half)
        self._context, self._context_text = [], ""
        self._pending = self._pending[count:]
        self._sent = max(self._sent - len(text) + len(left[count]), 0)

    def _start(self, context: list[int]) -> None:
        self._context = context
        self._context_text = self._decode(context)
        self._pending = []
        self._sent = 0

    def _prompt_context(self, prompt_ids: Sequence[int]) -> list[int]:
        """The fewest tokens at the prompt's end that have text; none if the prompt ends within a character."""
        tail: list[int] = []
        text = ""
        for token_id in filter(self._has_text, reversed(prompt_ids)):
            tail.insert(0, token_id)
            text = self._decode(tail)
            if (text and not text.endswith(REPLACEMENT)) or len(tail) == _CHARACTER_TOKENS:
                break
        return [] if text.endswith(REPLACEMENT) else tail

    def _has_text(self, token_id: int) -> bool:
        """False for what decoding passes over: special tokens, and rows of the embedding that no token has."""
        return token_id not in self._silent and self._backend.id_to_token(token_id) is not None

    def _decode(self, ids: list[int]) -> str:
        text: str = self._backend.decode(ids, skip_special_tokens=True)
        return text


class _StopStrings:
    """Holds back what may be the beginning of a stop string. Knuth-Morris-Pratt: one state per stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("a stop string is empty")
        self._patterns = [(stop, _failure(stop)) for stop in stops]
        self._states = [0] * len(stops)
        self._held = ""
        self.found = False

    def push(self, text: str, *, armed: bool) -> str:
        """What of the held and the new text can go out. A match ends it only if `armed`."""
        if not self._patterns:
            return text
        held = self._held + text
        for index, character in enumerate(text, len(self._held) + 1):
            longest = self._advance(character)
            if longest and armed:
                self.found = True
                return held[: index - longest]
        certain = len(held) - max(self._states)
        self._held = held[certain:]
        return held[:certain]

    def finish(self) -> str:
        held, self._held = self._held, ""
        return "" if self.found else held

    def _advance(self, character: str) -> int:
        """Moves every state on; the length of the longest stop string that is complete with this character, or 0."""
        longest = 0
        for index, (stop, failure) in enumerate(self._patterns):
            state = self._states[index]
            while state and stop[state] != character:
                state = failure[state]
            state += stop[state] == character
            if state == len(stop):
                longest = max(longest, state)
                state = failure[state]
            self._states[index] = state
        return longest


def _failure(stop: str) -> list[int]:
    """For each length n the longest proper prefix of `stop` that ends `stop[:n]`."""
    failure = [0, 0]
    for character in stop[1:]:
        state = failure[-1]
        while state and stop[state] != character:
            state = failure[state]
        failure.append(state + (stop[state] == character))
    return failure


@lru_cache(maxsize=4)
def _special_ids(tokenizer: "PreTrainedTokenizerFast") -> frozenset[int]:
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return frozenset(token_id for token_id, token in added.items() if token.special)
