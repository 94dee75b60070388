"""From dialogues to token ids of which every assistant turn is a target.

The whole dialogue is rendered and tokenised at once, without added special tokens: the ids are the server's for the
same dialogue (`chorus.services.chat`). Which characters the assistant says is known in one of two ways:

    {% generation %} ... {% endgeneration %}    the template marks them; taken to the letter
    render(messages[:i], generation prompt)     else: what messages[:i+1] add to this, up to the token that ends the
                                                turn (white space after a special token is nobody's to learn)

A token is a target if any of its characters is marked, as in transformers' `return_assistant_tokens_mask`.
"""

import re
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from jinja2 import TemplateError
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from chorus.adapters import chat_template
from chorus.errors import FailedPrecondition, InvalidArgument
from chorus.trainer.examples import Dialogue, Message

FIELD: Final = "data.chat_template"
_MARKS: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REMEDY: Final = "put {% generation %} and {% endgeneration %} around what the assistant says and ends with"


class Learned(NamedTuple):
    """Token ids of a dialogue, and the positions of those that are learned, in order."""

    ids: tuple[int, ...]
    targets: tuple[int, ...]


def template_for(own: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """The template that lays dialogues out: `data.chat_template`, else the tokenizer's default.

    Raises:
        InvalidArgument: a template that the server would refuse, or none.
    """
    if own is not None:
        if len(own) > chat_template.MAX_CHARS:
            raise InvalidArgument(f"{FIELD}: at most {chat_template.MAX_CHARS} characters", field=FIELD)
        chat_template.check(own, FIELD)
        return own
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError:  # none, or several and no default
        raise InvalidArgument(
            f"{FIELD}: the data holds messages, and the base has no chat template; set one, a file's path or jinja",
            reason="NO_CHAT_TEMPLATE",
            field=FIELD,
        ) from None
    return template


class ChatLayout:
    """Lays dialogues out by one template and one tokenizer."""

    def __init__(self, template: str, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise FailedPrecondition(
                "the base's tokenizer has no fast (tokenizers) form, which messages need", reason="BAD_TOKENIZER"
            )
        self._template = template
        self._marked = _MARKS.search(template) is not None
        self._variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        added = {token for token, word in tokenizer.added_tokens_decoder.items() if word.special}
        self._special = frozenset(tokenizer.all_special_ids) | added

    def encode(self, dialogue: Dialogue) -> Learned:
        """Ids and targets; the first token is never a target, nothing predicts it.

        Raises:
            InvalidArgument: FILE:LINE and why the template can not lay the dialogue out, or does not show what the
                assistant says.
        """
        text, marks = self._render(dialogue.messages, dialogue.where, marks=self._marked)
        spans = marks if self._marked else self._added(dialogue, text)
        encoding = self._backend.encode(text, add_special_tokens=False)
        targets = sorted({position for span in spans for position in self._positions(encoding, text, span)} - {0})
        if not targets:
            raise _refusal(dialogue.where, f"the chat template shows nothing that the assistant says; {_REMEDY}")
        return Learned(tuple(encoding.ids), tuple(targets))

    def _added(self, dialogue: Dialogue, text: str) -> list[tuple[int, int]]:
        """Characters [start, end) of each assistant turn, by rendering what is before it and what is up to it."""
        spans = []
        for i, message in enumerate(dialogue.messages):
            if message.role != "assistant":
                continue
            before, _ = self._render(dialogue.messages[:i], dialogue.where, prompt=True)
            after, _ = self._render(dialogue.messages[: i + 1], dialogue.where)
            if not (after.startswith(before) and text.startswith(after)):
                raise _refusal(
                    dialogue.where,
                    f"messages[{i}]: the chat template lays a dialogue out differently once it goes on, so that the "
                    f"assistant's words can not be told from the rest; in {FIELD}, {_REMEDY}",
                )
            spans.append((len(before), len(after)))
        return spans

    def _positions(self, encoding: Encoding, text: str, span: tuple[int, int]) -> list[int]:
        start, end = span
        offsets = encoding.offsets
        inside = [i for i, (first, last) in enumerate(offsets) if first < end and last > start]
        if self._marked:
            return inside
        ends = [i for i in inside if encoding.ids[i] in self._special]
        if ends and not text[offsets[ends[-1]][1] : end].strip():
            return [i for i in inside if i <= ends[-1]]
        return inside

    def _render(
        self, messages: Sequence[Message], where: str, *, prompt: bool = False, marks: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        rendered: Any  # declared too narrowly by transformers
        try:
            rendered = render_jinja_template(
                conversations=[[message._asdict() for message in messages]],
                chat_template=self._template,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=prompt,
                **self._variables,
            )
        except Exception as error:  # a template is a program; whatever it raises is about this line
            why = str(error.message) if type(error) is TemplateError else f"{type(error).__name__}: {error}"
            raise _refusal(where, f"the chat template can not lay the messages out: {' '.join(why.split())}") from None
        texts, spans = rendered
        return texts[0], [(start, end) for start, end in spans[0]] if marks else []


def _refusal(where: str, what: str) -> InvalidArgument:
    return InvalidArgument(f"{where}: {what}", reason="BAD_DATA", field="messages")
