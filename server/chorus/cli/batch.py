"""`chorus generate --input`: a file of requests, with a progress bar where there is a terminal."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from chorus.errors import InvalidArgument

if TYPE_CHECKING:
    from chorus.client import Progress

# A line on stderr this often where there is no terminal.
PLAIN_EVERY_S = 10.0


def run(
    source: Path, output: Path, *, server: str, concurrency: int, timeout: float, defaults: Mapping[str, Any]
) -> None:
    """Checks all lines, then asks for what `output` lacks. Exits 1 if any line failed, 2 if the input is wrong."""
    from chorus.client import read_lines

    try:
        lines = read_lines(source, {name: value for name, value in defaults.items() if value is not None})
    except InvalidArgument as error:
        raise typer.BadParameter(error.message) from None

    from chorus.client import generate_file

    with _progress(str(source)) as on_progress:
        progress = generate_file(
            server, lines, output, concurrency=concurrency, timeout=timeout, on_progress=on_progress
        )
    resumed = f", {progress.resumed} of them from an earlier run" if progress.resumed else ""
    print(f"{progress.done - progress.failed} of {progress.total} answered{resumed}: {output}", file=sys.stderr)
    if progress.failed:
        print(f"{progress.failed} failed, see their lines; run it again to ask only for them", file=sys.stderr)
        raise typer.Exit(1)


@contextmanager
def _progress(label: str) -> "Iterator[Callable[[Progress], None]]":
    if not sys.stderr.isatty():
        yield _plain()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Bar(*columns, console=Console(stderr=True, markup=False), transient=True) as bar:
        task = bar.add_task(label)

        def show(progress: "Progress") -> None:
            failed = f", {progress.failed} failed" if progress.failed else ""
            bar.update(task, completed=progress.done, total=progress.total, description=f"{label}{failed}")

        yield show


def _plain() -> "Callable[[Progress], None]":
    from time import monotonic

    last = monotonic()

    def show(progress: "Progress") -> None:
        nonlocal last
        if monotonic() - last >= PLAIN_EVERY_S:
            last = monotonic()
            print(f"{progress.done} of {progress.total}, {progress.failed} failed", file=sys.stderr, flush=True)

    return show
