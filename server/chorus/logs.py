"""What the server writes about itself: one line a record, as text or as one JSON object, for every library in it.

    with call("Generate", request_id):      every line inside has the request's id ...
        note(tenant="acme")                 ... and what has become known of it by then

Prompts, completions and keys are never logged, at any level. Code that logs passes ids and counts, never text; what
this module can see to is the rest: other libraries speak from WARNING on only, and of an exception whose text may quote
its input (pydantic's, a template's) only the type and the frames are written.

Knows the standard library alone; not gRPC, not requests.
"""

import datetime
import json
import logging
import os
import secrets
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import IO, Any, Literal

Format = Literal["text", "json"]
Level = Literal["debug", "info", "warning", "error"]

# Their texts name operations, files, types and sizes. Others may hold what a stranger sent.
_TOLD: tuple[type[BaseException], ...] = (
    *(RuntimeError, MemoryError, OSError, TypeError, AttributeError, NameError, ImportError),
)
_MAX_TEXT = 2000
# These bring handlers of their own when they are imported.
_OTHERS = ("transformers", "huggingface_hub", "torch", "grpc", "grpc._cython.cygrpc", "py.warnings")

_call: ContextVar[dict[str, Any] | None] = ContextVar("chorus-call", default=None)


def set_up(form: Format, level: Level, stream: IO[str] | None = None) -> None:
    """Sends everything that is logged to `stream` (stderr): ours from `level` on, other libraries' from WARNING on."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("chorus").setLevel(level.upper())
    logging.captureWarnings(True)
    if form == "json":
        # gRPC's core and progress bars write past Python; what matters of gRPC's lines comes as exceptions too.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    adopt_others()


def adopt_others() -> None:
    """Takes away other libraries' own handlers; to be called again when they have been imported."""
    for name in _OTHERS:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True


@contextmanager
def call(method: str, request_id: str) -> Iterator[dict[str, Any]]:
    """Everything logged by this task inside the block carries the call's facts, which it can add to."""
    facts: dict[str, Any] = {"request_id": request_id, "method": method}
    token = _call.set(facts)
    try:
        yield facts
    finally:
        _call.reset(token)


def note(**facts: Any) -> None:
    """Adds to what the lines of the call under way carry; outside of a call it does nothing."""
    known = _call.get()
    if known is not None:
        known.update(facts)


def new_request_id() -> str:
    return secrets.token_hex(8)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, then the call's facts, `fields`, and an exception."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _time(record).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_facts(record),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = describe(record.exc_info[1])
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """`TIME LEVEL LOGGER: MESSAGE key=value ...`, and an exception's frames below."""

    def format(self, record: logging.LogRecord) -> str:
        facts = "".join(f" {key}={value}" for key, value in _facts(record).items())
        message = record.getMessage().replace("\n", " ")
        line = f"{_time(record):%Y-%m-%d %H:%M:%S,%f}"[:-3] + f" {record.levelname} {record.name}: {message}{facts}"
        if record.exc_info and record.exc_info[1] is not None:
            line += "\n" + describe(record.exc_info[1])
        return line


def describe(error: BaseException) -> str:
    """Frames, type and, where it can not quote a request, text of an exception and of those that led to it."""
    parts: list[str] = []
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        frames = "".join(traceback.format_tb(current.__traceback__))
        text = str(current)[:_MAX_TEXT] if isinstance(current, _TOLD) else "(its text may quote a request)"
        parts.append(f"Traceback (most recent call last):\n{frames}{type(current).__name__}: {text}")
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return "\n\nthen:\n\n".join(reversed(parts))


def _facts(record: logging.LogRecord) -> dict[str, Any]:
    """What the call knows of itself, then what this record alone has in `extra={"fields": ...}`."""
    return {**(_call.get() or {}), **getattr(record, "fields", {})}


def _time(record: logging.LogRecord) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(record.created).astimezone()
