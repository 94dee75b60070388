"""How the commands speak: results on stdout, JSON or a table; everything else on stderr."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any


def complain(text: str) -> None:
    """Writes `chorus: TEXT` to stderr as one line, without control characters."""
    line = "".join(char for char in " ".join(text.split()) if char.isprintable())
    print(f"chorus: {line}", file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """Writes one JSON value, a dict or a dataclass, as one line on stdout."""
    plain = value if isinstance(value, dict) else asdict(value)
    print(json.dumps(plain, default=_jsonable), flush=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, empty: str) -> None:
    """Writes a table for people on stdout; `empty` is said instead of one without rows."""
    from rich.console import Console
    from rich.table import Table

    # A pipe has no width: a digest is not folded there.
    width = None if sys.stdout.isatty() else 1000
    # No markup: a name from the server is text, whatever brackets it holds.
    console = Console(markup=False, highlight=False, width=width)
    if not rows:
        console.print(empty)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console.print(table)


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Shows bytes done on stderr, only if that is a terminal; yields what to call with (done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = TextColumn(label), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn()
    hidden = not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=hidden) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def mebibytes(size: int) -> str:
    return f"{size / (1 << 20):,.1f} MiB"


def short(digest: str) -> str:
    """Shortens a digest to what tells versions apart by eye."""
    return digest[:12]


def _jsonable(value: object) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not JSON")
