"""A batch's input: JSON lines, each checked whole before anything is sent.

    {"id": "a", "prompt": "Once", "adapter": "acme/support", "max_tokens": 8}
    {"token_ids": [1, 2, 3], "temperature": 0}
    {"messages": [{"role": "user", "content": "Hi"}], "stop": ["."], "logit_bias": {"7": -5}}

A line has exactly one of `prompt`, `token_ids` and `messages`, and any of `adapter`, `priority`, `id` and the sampling
parameters. Without an `id` it is called by its line number, `line-3`. Ranges are the server's to judge.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from chorus.client.batch import BatchRequest
from chorus.client.requests import Sampling, build_request
from chorus.errors import InvalidArgument

PROMPTS = ("prompt", "token_ids", "messages")
FIELDS = (*PROMPTS, "adapter", "priority", "id", *Sampling.__annotations__)
_MAX_ID = 128


@dataclass(frozen=True, slots=True)
class InputLine:
    """One request of the file; `sha256` is of the message that is sent for it, so that resuming knows it again."""

    number: int
    request: BatchRequest
    sha256: str


def read_lines(path: Path, defaults: Mapping[str, Any] = MappingProxyType({})) -> list[InputLine]:
    """Reads and checks every line; `defaults` are the fields of lines that do not set them. Blank lines are skipped.

    Raises:
        InvalidArgument: a line that is wrong, with file, line and field; the first ten of them.
        OSError: the file can not be read.
    """
    lines: list[InputLine] = []
    wrong: list[str] = []
    ids: dict[str, int] = {}
    for number, text in _texts(path):
        try:
            line = _line(number, text, defaults)
            if (before := ids.setdefault(line.request.id, number)) != number:
                raise InvalidArgument(f"id: {line.request.id!r} is the id of line {before} too", field="id")
        except InvalidArgument as error:
            wrong.append(f"{path}:{number}: {error.message}")
            if len(wrong) == 10:
                break
        else:
            lines.append(line)
    if wrong:
        raise InvalidArgument("; ".join(wrong), reason="BAD_INPUT_LINE")
    return lines


def _texts(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, data in enumerate(file, start=1):
            try:
                text = data.decode("utf-8").strip()
            except UnicodeDecodeError:
                raise InvalidArgument(f"{path}:{number}: not UTF-8", reason="BAD_INPUT_LINE") from None
            if text:
                yield number, text


def _line(number: int, text: str, defaults: Mapping[str, Any]) -> InputLine:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidArgument("not JSON") from None
    if not isinstance(found, dict):
        raise InvalidArgument("not a JSON object")
    _refuse_unknown(found)
    given = [name for name in PROMPTS if name in found]
    if len(given) != 1:
        raise InvalidArgument(f"give exactly one of {', '.join(PROMPTS)}, not {len(given)}")
    fields = {**defaults, **found}
    name, prompt = given[0], found[given[0]]
    expected = str if name == "prompt" else list
    if not isinstance(prompt, expected) or (name == "messages" and not _messages(prompt)):
        raise InvalidArgument(f"{name}: must be {_SHAPES[name]}", field=name)
    request = BatchRequest(
        id=_id(found.get("id"), number),
        prompt=cast(Any, prompt),
        adapter=_text("" if (adapter := fields.get("adapter")) is None else adapter, "adapter"),
        priority=fields.get("priority"),
        sampling=cast(Sampling, {key: _value(key, fields[key]) for key in Sampling.__annotations__ if key in fields}),
    )
    built = build_request(request.prompt, request.adapter, request.sampling, priority=request.priority)
    return InputLine(number, request, hashlib.sha256(built.SerializeToString(deterministic=True)).hexdigest())


_SHAPES = {
    "prompt": "a text",
    "token_ids": "a list of numbers",
    "messages": 'a list of {"role", "content"}, not empty',
}


def _messages(value: Sequence[object]) -> bool:
    return bool(value) and all(isinstance(item, dict) for item in value)


def _refuse_unknown(found: Mapping[str, Any]) -> None:
    for name in found:
        if name not in FIELDS:
            close = get_close_matches(name, FIELDS, n=1)
            raise InvalidArgument(f"unknown field {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))


def _id(value: object, number: int) -> str:
    if value is None:
        return f"line-{number}"
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    text = _text(value, "id")
    if not 0 < len(text) <= _MAX_ID:
        raise InvalidArgument(f"id: must have 1 to {_MAX_ID} characters, not {len(text)}", field="id")
    return text


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise InvalidArgument(f"{name}: must be a text", field=name)
    return value


def _value(name: str, value: Any) -> Any:
    # JSON's keys are texts.
    if name != "logit_bias" or value is None:
        return value
    try:
        return {int(token): bias for token, bias in value.items()}
    except (AttributeError, ValueError):
        raise InvalidArgument('logit_bias: must be an object like {"7": -5}', field="logit_bias") from None
