"""A batch's output: one JSON line an outcome, appended as outcomes come, so that a run that was cut off can go on.

    {"id": "a", "line": 1, "request_sha256": "...", "completion": {...}}
    {"id": "b", "line": 2, "request_sha256": "...", "error": {"code", "reason", "message", "fields"}}

Lines are in the order in which requests end; `id` and `line` say whose they are. Going on keeps the completions, drops
errors and a torn last line, and asks for what is missing.
"""

import asyncio
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chorus.client.aio import AsyncClient
from chorus.client.batch import BatchOutcome, run_batch
from chorus.client.batch_lines import InputLine
from chorus.client.settings import DEFAULT_TIMEOUT_S
from chorus.errors import FailedPrecondition

# Of every line, by which a torn one is told from a file that is not ours.
_BEGINNING = b'{"id": '


@dataclass(frozen=True, slots=True)
class Progress:
    """Requests so far: `done` counts all that have ended, `resumed` those of an earlier run, `failed` errors."""

    total: int
    done: int
    resumed: int
    failed: int


async def run_file(
    client: AsyncClient,
    lines: Sequence[InputLine],
    output: Path,
    *,
    concurrency: int = 16,
    timeout: float | None = None,  # noqa: ASYNC109 - of each request
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Runs what `output` does not hold yet, and appends the outcomes to it; see `run_batch`.

    Raises:
        FailedPrecondition: `output` is not an output of these lines; it is left as it was.
        Unavailable: nobody listens any more; what has come is in `output`.
        OSError: `output` can not be written.
    """
    finished = _recover(output, {line.request.id: line for line in lines})
    missing = {line.request.id: line for line in lines if line.request.id not in finished}
    progress = Progress(len(lines), len(finished), len(finished), 0)
    on_progress(progress)
    requests = [line.request for line in missing.values()]
    with output.open("ab") as file:
        outcomes = run_batch(client, requests, concurrency=concurrency, timeout=timeout)
        async with aclosing(outcomes):
            async for outcome in outcomes:
                file.write(_encode(missing[outcome.request.id], outcome))
                file.flush()
                failed = progress.failed + (outcome.error is not None)
                progress = Progress(progress.total, progress.done + 1, progress.resumed, failed)
                on_progress(progress)
        os.fsync(file.fileno())
    return progress


def generate_file(
    server: str,
    lines: Sequence[InputLine],
    output: Path,
    *,
    concurrency: int = 16,
    timeout: float | None = DEFAULT_TIMEOUT_S,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """`run_file` for programs without an event loop: opens a client of its own for `server`, and waits for the end.

    Raises what `run_file` raises, and Unavailable at once where nobody listens.
    """

    async def whole() -> Progress:
        async with AsyncClient(server, timeout=timeout) as client:
            # Nobody there, or the wrong port, is known now and not after all the tries of a request.
            await client.model()
            return await run_file(client, lines, output, concurrency=concurrency, on_progress=on_progress)

    return asyncio.run(whole())


def _encode(line: InputLine, outcome: BatchOutcome) -> bytes:
    entry: dict[str, Any] = {"id": line.request.id, "line": line.number, "request_sha256": line.sha256}
    if outcome.completion is not None:
        entry["completion"] = outcome.completion.to_json()
    if (error := outcome.error) is not None:
        fields = {violation.field: violation.description for violation in error.violations}
        entry["error"] = {"code": error.code, "reason": error.reason, "message": error.message, "fields": fields}
    return json.dumps(entry).encode() + b"\n"


def _recover(output: Path, lines: dict[str, InputLine]) -> set[str]:
    """Gives the ids that need no asking, and leaves only their lines in the file; all or nothing."""
    if not output.exists():
        return set()
    finished: set[str] = set()
    draft = output.with_name(f"{output.name}.resuming")
    try:
        with draft.open("wb") as kept:
            dropped = False
            for number, data in enumerate(_read(output), start=1):
                id_ = _finished_id(data, f"{output}:{number}", lines)
                if id_ is None or id_ in finished:
                    dropped = True
                else:
                    finished.add(id_)
                    kept.write(data)
            os.fsync(kept.fileno())
        if dropped:
            draft.replace(output)
    finally:
        draft.unlink(missing_ok=True)
    return finished


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from file


def _finished_id(data: bytes, where: str, lines: dict[str, InputLine]) -> str | None:
    """Gives the id of a completion's line, None for an error's or a torn one."""
    if not data.endswith(b"\n") and (data.startswith(_BEGINNING) or _BEGINNING.startswith(data)):
        return None
    try:
        entry = json.loads(data)
        id_, sha256 = entry["id"], entry["request_sha256"]
    except (ValueError, KeyError, TypeError):
        raise _foreign(where, "is not a line of a batch's output") from None
    line = lines.get(id_)
    if line is None:
        raise _foreign(where, f"answers {id_!r}, which is not in the input")
    if line.sha256 != sha256:
        raise _foreign(where, f"answers another request that was called {id_!r}")
    return id_ if "completion" in entry else None


def _foreign(where: str, what: str) -> FailedPrecondition:
    return FailedPrecondition(f"{where} {what}; name another output, or remove this one", reason="FOREIGN_OUTPUT")
