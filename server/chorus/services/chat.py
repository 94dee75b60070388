"""Dialogues as prompts: the chat template of the adapter, or else of the base's tokenizer.

It gives what transformers' `apply_chat_template(add_generation_prompt=True)` gives. The template's text is tokenized
without the special tokens that the tokenizer adds to texts: what begins the sequence is written by the template, once.

Templates are programs. transformers compiles them for jinja's sandbox; they run on threads of their own, for
`TEMPLATE_SECONDS` at most (see `time_limit` for what that ends and what not), and are stopped when they have written
more than the context can hold. That is why they run here, piece by piece, and not in `apply_chat_template`. What a
template keeps in variables is not bounded.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _compile_jinja_template

from chorus.adapters import chat_template
from chorus.adapters.artifact import read_task
from chorus.errors import ChorusError, DataLoss, FailedPrecondition, InvalidArgument
from chorus.services.catalog import Leased
from chorus.services.text import TextCodec
from chorus.services.time_limit import TimeLimit
from chorus.v1 import generate_pb2

FIELD = "messages"
TEMPLATE_SECONDS = 2.0
MAX_REFUSAL_CHARS = 300
_THREADS = 2
_REMEMBERED = 64


class Chat:
    """Lays dialogues out. Lives on the event loop."""

    def __init__(self, text: TextCodec) -> None:
        self._text = text
        self._limit = TimeLimit(TEMPLATE_SECONDS, threads=_THREADS, name="chat")
        self._own: OrderedDict[str, str] = OrderedDict()  # by SHA-256, the last used at the end
        self.base_template = _template_of(text.tokenizer)

    async def prompt(self, messages: Iterable[generate_pb2.Message], leased: Leased) -> tuple[int, ...]:
        """The dialogue in tokens, the beginning of the assistant's answer included.

        Raises:
            FailedPrecondition: no tokenizer; neither the adapter nor the base has a template.
            InvalidArgument: the template refuses the dialogue, takes too long, or writes more than the context holds.
            DataLoss: the adapter's template is no longer what was pushed.
        """
        tokenizer = self._text.require_tokenizer(FIELD)
        dialogue = [{"role": message.role, "content": message.content} for message in messages]
        self._text.check_length(sum(len(message["content"]) for message in dialogue))
        template = await self._template(leased)
        rendered = await self._render(tokenizer, template, dialogue)
        return await self._text.encode(rendered, FIELD, special=False)

    def close(self) -> None:
        self._limit.close()

    async def _template(self, leased: Leased) -> str:
        if leased.adapter is not None and leased.chat_template:
            return await self._adapters_template(leased.chat_template, Path(leased.adapter.path))
        if self.base_template is None:
            raise FailedPrecondition(
                f"{FIELD}: neither this base model nor the adapter has a chat template; send text or token_ids, or "
                "push the adapter with a chat_template in its task.json",
                reason="NO_CHAT_TEMPLATE",
                field=FIELD,
            )
        return self.base_template

    async def _adapters_template(self, digest: str, folder: Path) -> str:
        template = self._own.get(digest)
        if template is None:
            template = await asyncio.to_thread(_read, digest, folder)
            self._own[digest] = template
            while len(self._own) > _REMEMBERED:
                self._own.popitem(last=False)
        self._own.move_to_end(digest)
        return template

    async def _render(self, tokenizer: PreTrainedTokenizerFast, template: str, dialogue: list[dict[str, str]]) -> str:
        variables: dict[str, object] = {
            **tokenizer.special_tokens_map,
            "messages": dialogue,
            "tools": None,
            "documents": None,
        }
        try:
            return await self._limit.run(lambda: self._write(template, variables))
        except InvalidArgument:
            raise
        except TimeoutError:
            text = f"{FIELD}: the chat template ran for over {TEMPLATE_SECONDS:g} s with them"
        except Exception as error:
            text = f"{FIELD}: the chat template can not lay them out{_why(error)}"
        raise InvalidArgument(text, reason="CHAT_TEMPLATE_REFUSED", field=FIELD)

    def _write(self, template: str, variables: dict[str, object]) -> str:
        pieces, characters = [], 0
        for piece in _compile_jinja_template(template).generate(**variables, add_generation_prompt=True):
            characters += len(piece)
            self._text.check_length(characters)
            pieces.append(piece)
        return "".join(pieces)


def _template_of(tokenizer: PreTrainedTokenizerFast | None) -> str | None:
    try:
        return tokenizer.get_chat_template() if tokenizer is not None else None
    except ValueError:  # none, or several and no default
        return None


def _read(digest: str, folder: Path) -> str:
    try:
        card = read_task(folder)
    except (ChorusError, OSError) as error:
        raise DataLoss("the adapter's stored task.json can not be read any more; push it again") from error
    template = card.chat_template if card else None
    if template is None or chat_template.digest(template) != digest:
        raise DataLoss("the adapter's stored chat template no longer matches its digest; push it again")
    return template


def _why(error: Exception) -> str:
    """What a template says itself, by `raise_exception`; nothing of any other error's text."""
    if type(error) is not TemplateError:
        return ""
    said = "".join(character if character.isprintable() else " " for character in str(error.message))
    return f": {said[:MAX_REFUSAL_CHARS]}"
