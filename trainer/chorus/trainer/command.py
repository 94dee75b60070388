"""`chorus train`: the config file in, an adapter folder and a summary out.

Knows the terminal. torch and transformers are imported when a run begins, so that help and wrong usage cost nothing.
"""

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from chorus.cli.output import complain, print_json, print_table
from chorus.errors import InvalidArgument
from chorus.trainer.config import TrainConfig, load_config

if TYPE_CHECKING:
    from chorus.trainer.loop import TrainResult
    from chorus.trainer.records import Record


def train(
    config: Annotated[Path, typer.Argument(help="YAML file: base, data, lora, train, task.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the adapter; must not exist.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Overrides one key of the file; repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON line.")] = False,
) -> None:
    """Train a LoRA adapter on JSONL of {"prompt", "completion"}.

    Example: chorus train acme.yaml --output adapters/acme --set train.steps=200

    Only completions are learned. Same seed, data and machine: same adapter, bit for bit.

    The folder holds what PEFT writes, task.json for the server and train_log.jsonl.
    It appears complete or not at all.
    """
    try:
        settings = load_config(config, overrides or ())
    except InvalidArgument as error:
        complain(error.message)
        raise typer.Exit(2) from None
    result = _run(settings, output)
    for warning in result.data.warnings():
        complain(f"warning: {warning}")
    if as_json:
        print_json(asdict(result) | {"output": str(result.output)})
    else:
        _print_summary(result)


def _run(config: TrainConfig, output: Path) -> "TrainResult":
    console = Console(stderr=True)
    with console.status("loading torch") if console.is_terminal else nullcontext():
        from chorus.trainer.loop import train as run
    with _progress(console) as show:
        return run(config, output, on_progress=show)


@contextmanager
def _progress(console: Console) -> Iterator[Callable[["Record"], None]]:
    """A callback that draws a bar on a terminal, and does nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("training", total=None)
        validation = ""

        def show(record: "Record") -> None:
            nonlocal validation
            if hasattr(record, "validation_loss"):
                validation = f"  validation {record.validation_loss:.3f}"
                return
            progress.update(
                task, completed=record.step, total=record.steps, description=f"loss {record.loss:.3f}{validation}"
            )

        yield show


def _print_summary(result: "TrainResult") -> None:
    rows = []
    if result.validation_loss is not None and result.validation_loss_before is not None:
        rows.append(("validation loss", f"{result.validation_loss_before:.4f}", f"{result.validation_loss:.4f}"))
    rows.append(("training loss", "", f"{result.train_loss:.4f}"))
    rows.append(("parameters", f"{result.base_parameters:,}", f"+ {result.trainable_parameters:,}"))
    print_table(("", "base", "tuned"), rows, empty="")
    print(f"{result.steps} steps, {result.tokens:,} tokens, {result.seconds:.1f} s")
    print(f"adapter: {result.output}")
    print(f"publish: chorus adapters push {shlex.quote(str(result.output))} --tenant TENANT --name NAME")
