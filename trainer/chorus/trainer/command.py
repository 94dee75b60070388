"""`chorus train`: the config file in, an adapter folder and a summary out.

Knows the terminal. torch and transformers are imported when a run begins, so that help and wrong usage cost nothing.
"""

import shlex
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from chorus.cli.lazy import describe
from chorus.cli.output import complain, mebibytes, print_json, print_table
from chorus.errors import ChorusError, InvalidArgument
from chorus.trainer.config import TrainConfig, load_config
from chorus.trainer.interrupts import Interrupted, Terminated, stop_on_signals
from chorus.trainer.publish import DEFAULT_ALIAS, Destination
from chorus.trainer.publish import publish as push

if TYPE_CHECKING:
    from chorus.trainer.dry_run import DryRun
    from chorus.trainer.loop import TrainResult
    from chorus.trainer.records import Record


def train(
    config: Annotated[Path, typer.Argument(help="YAML file: base, data, lora, train, task.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the adapter; must not exist.", show_default=False)
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Overrides one key of the file; repeatable."),
    ] = None,
    *,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoint that an interrupted run left.")
    ] = False,
    publish: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="HOST:PORT TENANT/ADAPTER", help="Push the adapter to this server's admin port at the end."
        ),
    ] = None,
    alias: Annotated[
        str | None, typer.Option(help="The alias that --publish moves; live if not given.", show_default=False)
    ] = None,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Tell parameters, memory, tokens and samples; train nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON line.")] = False,
) -> None:
    """Train a LoRA adapter on JSONL of {"prompt", "completion"}.

    Example: chorus train acme.yaml --output adapters/acme --set train.steps=200

    Example: chorus train acme.yaml -o adapters/acme --publish 127.0.0.1:50052 acme/support

    Example: chorus train acme.yaml --dry-run

    Only completions are learned. Same seed, data and machine: same adapter, bit for bit.

    The folder holds what PEFT writes, task.json for the server, a model card and train_log.jsonl.
    It appears complete or not at all.

    Ctrl-C leaves OUTPUT.checkpoint; --resume goes on from it to the same bits.
    """
    try:
        settings = load_config(config, overrides or ())
        destination = _destination(publish, alias)
    except InvalidArgument as error:
        complain(error.message)
        raise typer.Exit(2) from None
    if dry:
        _dry_run(settings, as_json=as_json)
        return
    if output is None:
        raise typer.BadParameter("needed, unless with --dry-run", param_hint="'--output' / '-o'")
    result = _run(settings, output, resume=resume)
    for warning in result.data.warnings():
        complain(f"warning: {warning}")
    published = _publish(result.output, destination) if destination else None
    if as_json:
        print_json(asdict(result) | {"output": str(result.output), "published": published})
    else:
        _print_summary(result)
        if published:
            print(f"published: {published}")
        elif not destination:
            print(f"publish: chorus adapters push {shlex.quote(str(result.output))} --tenant TENANT --name NAME")
    if destination and not published:
        raise typer.Exit(1)


def _destination(publish: tuple[str, str] | None, alias: str | None) -> Destination | None:
    if publish is None:
        if alias is not None:
            raise InvalidArgument("--alias goes with --publish", field="alias")
        return None
    return Destination.parse(*publish, alias or DEFAULT_ALIAS)


def _publish(folder: Path, destination: Destination) -> str | None:
    """The new version's name; None, and a line that says how to try again, where the push failed."""
    try:
        return push(folder, destination)
    except (ChorusError, OSError) as error:
        what = describe(error) if isinstance(error, ChorusError) else str(error)
        complain(f"not published: {what}; the adapter is kept, try again: {destination.command(folder)}")
        return None


def _run(config: TrainConfig, output: Path, *, resume: bool) -> "TrainResult":
    console = Console(stderr=True)
    with console.status("loading torch") if console.is_terminal else nullcontext():
        from chorus.trainer.loop import train as run
    with stop_on_signals() as stop:
        try:
            with _progress(console) as show:
                return run(config, output, on_progress=show, resume=resume, stop=stop)
        except Interrupted as interrupted:
            complain(
                f"interrupted after step {interrupted.step} of {interrupted.steps}; "
                f"to go on from {interrupted.checkpoint}, give the same command with --resume"
            )
            raise SystemExit(128 + interrupted.signum) from None
        except Terminated:
            complain("terminated")
            raise SystemExit(128 + signal.SIGTERM) from None


def _dry_run(config: TrainConfig, *, as_json: bool) -> None:
    console = Console(stderr=True)
    with console.status("loading the base") if console.is_terminal else nullcontext():
        from chorus.trainer.dry_run import dry_run

        plan = dry_run(config)
    for warning in plan.data.warnings():
        complain(f"warning: {warning}")
    if as_json:
        print_json(asdict(plan))
    else:
        _print_plan(plan)


def _print_plan(plan: "DryRun") -> None:
    share = plan.trainable_parameters / plan.base_parameters
    rows = [
        ("trainable parameters", f"{plan.trainable_parameters:,} ({share:.2%} of {plan.base_parameters:,})"),
        *((name, mebibytes(size)) for name, size in asdict(plan.memory).items()),
        ("memory in all, about", mebibytes(plan.memory.total)),
        ("examples", f"{plan.examples:,}"),
        ("tokens an epoch", f"{plan.tokens_per_epoch:,}, {plan.learned_tokens_per_epoch:,} of them learned"),
        ("steps", f"{plan.steps:,}, {plan.steps_per_epoch:,} an epoch"),
    ]
    print_table(("", ""), rows, empty="")
    if packing := plan.data.packed():
        print(packing)
    for i, sample in enumerate(plan.samples, 1):
        print(f"\nsample {i}, what is learned in [[ ]]:")
        print("".join(f"[[{piece.text}]]" if piece.learned else piece.text for piece in sample))


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
    measured = (
        ("validation loss", result.validation_loss_before, result.validation_loss),
        ("token accuracy", result.validation_token_accuracy_before, result.validation_token_accuracy),
        ("exact match", result.validation_exact_match_before, result.validation_exact_match),
    )
    rows = [
        (title, f"{before:.4f}", f"{after:.4f}")
        for title, before, after in measured
        if before is not None and after is not None
    ]
    rows.append(("training loss", "", f"{result.train_loss:.4f}"))
    rows.append(("parameters", f"{result.base_parameters:,}", f"+ {result.trainable_parameters:,}"))
    print_table(("", "base", "tuned"), rows, empty="")
    early = f", stopped early, the best after {result.best_step}" if result.stopped_early else ""
    print(f"{result.steps} steps{early}, {result.tokens:,} tokens, {result.seconds:.1f} s")
    if packing := result.data.packed():
        print(packing)
    print(f"adapter: {result.output}")
