"""JSON from strangers: bounded, without duplicate keys, without NaN; and pydantic errors as ours.

Knows nothing of adapters. Everything that quotes a stranger's text in an error goes through `quote`.
"""

import json
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from chorus.errors import FieldViolation, InvalidArgument

QUOTE_LIMIT = 80
VIOLATION_LIMIT = 10

M = TypeVar("M", bound=BaseModel)


def quote(value: object, limit: int = QUOTE_LIMIT) -> str:
    """A value as printable ASCII, cut to about `limit` characters: safe in logs, terminals and protobuf strings."""
    if isinstance(value, str):
        text = ascii(value[: limit + 1])
    else:
        try:
            text = json.dumps(value, default=str)
        except (RecursionError, ValueError):
            text = type(value).__name__
    return text if len(text) <= limit else text[:limit] + "..."


def parse_object(data: bytes, what: str, *, reason: str = "MALFORMED_JSON") -> dict[str, Any]:
    """Parses one JSON object. `what` names the file in errors.

    Raises:
        InvalidArgument: not UTF-8, not JSON, not an object, a key given twice, or NaN / Infinity.
    """

    def refuse(problem: str) -> NoReturn:
        raise InvalidArgument(f"{what}: {problem}", reason=reason, field=what)

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            seen: set[str] = set()
            twice = next(key for key, _ in items if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            refuse(f"the key {quote(twice)} is given twice")
        return result

    def constant(name: str) -> NoReturn:
        refuse(f"{name} is not JSON")

    try:
        parsed = json.loads(data.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except UnicodeDecodeError:
        refuse("not UTF-8")
    except json.JSONDecodeError as error:
        refuse(f"not valid JSON: {error.msg} at character {error.pos}")
    except RecursionError:
        refuse("nested too deeply")
    except ValueError:
        refuse("not valid JSON: a number is too long")
    if not isinstance(parsed, dict):
        refuse("not a JSON object")
    return parsed


def validate(model: type[M], raw: Mapping[str, Any], what: str) -> M:
    """Validates `raw`; names every wrong field (the first ten of them).

    Raises:
        InvalidArgument: a wrong type or a value out of range.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_context=False, include_input=False)[:VIOLATION_LIMIT]
        violations = [FieldViolation(field_path(*item["loc"]) or what, item["msg"]) for item in wrong]
        text = "; ".join(f"{violation.field}: {violation.description}" for violation in violations)
        raise InvalidArgument(f"{what}: {text}", reason="INVALID_FIELD", violations=violations) from None


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


def canonical(value: object) -> bytes:
    """Canonical JSON: sorted keys, no spaces, ASCII."""
    return _CANONICAL.encode(value).encode("ascii")


def field_path(*steps: int | str) -> str:
    """A field's path for a violation; names that are not plain identifiers are quoted."""
    return ".".join(
        step
        if isinstance(step, str) and step.isascii() and step.isidentifier() and len(step) <= QUOTE_LIMIT
        else quote(step)
        for step in steps
    )
