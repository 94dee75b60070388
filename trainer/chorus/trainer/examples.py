"""The lines of a data file, as values: prompts with completions, or dialogues.

Knows JSONL and what a line may say. Does not know tokens (`data`, `dialogues`).
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import torch

from chorus.errors import InvalidArgument

#: Those that the server takes.
ROLES: Final = ("system", "user", "assistant")
_PAIR: Final = ("prompt", "completion")
_MESSAGE: Final = ("role", "content")


class Example(NamedTuple):
    """A whole prompt, and the text that should follow it."""

    prompt: str
    completion: str

    @property
    def beginning(self) -> object:
        """What must not be on both sides of a split."""
        return self.prompt


class Message(NamedTuple):
    """One turn; `role` is one of `ROLES`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Turns, at least one of them the assistant's; `where` is FILE:LINE, for messages."""

    messages: tuple[Message, ...]
    where: str

    @property
    def beginning(self) -> object:
        """What was said before the assistant's first turn."""
        return self.messages[: [message.role for message in self.messages].index("assistant")]


AnyExample = Example | Dialogue
_E = TypeVar("_E", Example, Dialogue, AnyExample)


def read_bytes(path: Path, field: str) -> bytes:
    """The file's bytes; `field` is the config key to blame in InvalidArgument."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidArgument(f"{field}: {path}: {error.strerror or error}", reason="BAD_DATA", field=field) from None


def read_examples(path: Path, field: str) -> list[AnyExample]:
    """The examples of a JSONL file, all of one form; `field` is the config key to blame.

    Raises:
        InvalidArgument: naming the file, the line (from 1) and what is wrong with it.
    """
    return parse_examples(read_bytes(path, field), path, field)


def parse_examples(raw: bytes, path: Path, field: str) -> list[AnyExample]:
    """Like `read_examples`, from bytes in memory; `path` is for messages. Blank lines are skipped."""
    examples: list[AnyExample] = []
    for number, line in enumerate(raw.split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            example = _parse_line(line, where)
            if examples and type(example) is not type(examples[0]):
                raise ValueError('the file mixes "messages" with "prompt" and "completion"; keep to one of them')
        except ValueError as error:
            raise InvalidArgument(f"{where}: {error}", reason="BAD_DATA", field=field) from None
        examples.append(example)
    if not examples:
        raise InvalidArgument(f"{path}: no examples in it", reason="BAD_DATA", field=field)
    return examples


def split(examples: Sequence[_E], fraction: float, seed: int) -> tuple[list[_E], list[_E]]:
    """Holds out `fraction` of the distinct prompts (beginnings of dialogues), so that no prompt is on both sides.

    Raises:
        InvalidArgument: nothing would be left to train on.
    """
    prompts = list(dict.fromkeys(example.beginning for example in examples))
    count = max(1, round(len(prompts) * fraction))
    if count >= len(prompts):
        raise InvalidArgument(
            f"data.validation_fraction: {fraction} of {len(prompts)} distinct prompts leaves nothing to train on",
            reason="BAD_DATA",
            field="data.validation_fraction",
        )
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = {prompts[i] for i in order[:count]}
    train = [example for example in examples if example.beginning not in held_out]
    return train, [example for example in examples if example.beginning in held_out]


def _parse_line(line: bytes, where: str) -> AnyExample:
    try:
        value: Any = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not valid JSON: nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError('must be an object like {"prompt": "...", "completion": "..."} or {"messages": [...]}')
    if "messages" in value:
        _only(value, ("messages",), "")
        return Dialogue(_messages(value["messages"]), where)
    return Example(*_texts(value, _PAIR, ""))


def _messages(value: object) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError('"messages" must be a list like [{"role": "user", "content": "..."}, ...]')
    messages = tuple(_message(item, f"messages[{i}]: ") for i, item in enumerate(value))
    if all(message.role != "assistant" for message in messages):
        raise ValueError('no message has the role "assistant", there is nothing to learn')
    return messages


def _message(value: object, place: str) -> Message:
    if not isinstance(value, dict):
        raise ValueError(f'{place}must be an object like {{"role": "user", "content": "..."}}')
    message = Message(*_texts(value, _MESSAGE, place))
    if message.role not in ROLES:
        raise ValueError(f'{place}unknown role "{message.role}", must be one of {", ".join(ROLES)}')
    return message


def _texts(value: dict[str, Any], names: tuple[str, ...], place: str) -> list[str]:
    for name in names:
        if name not in value:
            raise ValueError(f'{place}"{name}" is missing')
        if not isinstance(value[name], str):
            raise ValueError(f'{place}"{name}" must be a string')
        if not value[name]:
            raise ValueError(f'{place}"{name}" is empty')
        if not _is_text(value[name]):
            raise ValueError(f'{place}"{name}" holds half of a surrogate pair')
    _only(value, names, place)
    return [value[name] for name in names]


def _only(value: dict[str, Any], names: tuple[str, ...], place: str) -> None:
    if unknown := sorted(value.keys() - set(names)):
        raise ValueError(f'{place}unknown key "{unknown[0]}" (only {_listed(names)} {_are(names)} read)')


def _is_text(value: str) -> bool:
    """JSON can escape what no tokenizer takes."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _listed(names: Iterable[str]) -> str:
    return " and ".join(f'"{name}"' for name in names)


def _are(names: tuple[str, ...]) -> str:
    return "is" if len(names) == 1 else "are"
