"""A command group that knows its commands' names and one-line help, and imports one only when it is called.

`chorus --help` must not import torch, nor `chorus generate` the server's configuration, so the group holds stubs, and
puts the real command in the stub's place when the command line names it. Also the one place where exceptions become
exit codes.
"""

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, ClassVar, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from chorus.cli.output import complain
from chorus.errors import ChorusError

# What to do on the command line, where the error itself can not know it; by reason.
REMEDIES = {"UNREACHABLE": "start one with `chorus serve`, or name its address with --server or --admin"}
# click's UsageError: part of click or of typer, by typer's version.
_USAGE_ERROR: Any = typer.BadParameter.__base__


@dataclass(frozen=True, slots=True)
class Deferred:
    """A command that is not imported yet.

    `target` is `module:object`, a function or a `typer.Typer`; `extra` is the extra of the distribution that brings the
    packages it imports, None if the bare distribution is enough.
    """

    target: str
    help: str
    extra: str | None = None


class LazyGroup(TyperGroup):
    """Runs the commands in `deferred`; a subclass fills it."""

    deferred: ClassVar[Mapping[str, Deferred]] = {}

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, command in self.deferred.items():
            self.add_command(TyperCommand(name, help=command.help, rich_markup_mode="rich"), name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Finds the command and imports it."""
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None and name in self.deferred:
            ctx.invoked_subcommand = name
            command = load(name, self.deferred[name])
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        """Runs the command; where a package is missing, says which extra brings it."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            name = ctx.invoked_subcommand
            extra = self.deferred[name].extra if name in self.deferred else None
            if extra is None:
                raise
            complain(f"`chorus {name}` needs {error.name}, not installed here: pip install 'chorus-serve[{extra}]'")
            raise typer.Exit(1) from None

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Runs the command line and exits: 0 done, 2 wrong usage, 130 Ctrl-C, 1 anything else, with one line on stderr.

        A bug keeps its traceback.
        """
        try:
            # Not standalone: typer would draw a panel of several lines.
            status = super().main(*args, **{**kwargs, "standalone_mode": False})
        except _USAGE_ERROR as error:
            status = error.exit_code
            # Empty where the help was shown instead.
            if message := error.format_message():
                hint = f" (see `{error.ctx.command_path} --help`)" if error.ctx else ""
                complain(f"{message}{hint}")
        except typer.Abort:
            status = 1
            complain("aborted")
        except ChorusError as error:
            status = 1
            complain(describe(error))
        except OSError as error:
            status = 1
            complain(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))
        if status == 130:
            complain("interrupted")
        sys.exit(status or 0)


def describe(error: ChorusError) -> str:
    """Gives an error as `CODE (REASON): message`, without a reason that only says the code again."""
    reason = f" ({error.reason})" if error.reason != error.code else ""
    retry = f" (try again in {error.retry_after_s:g} s)" if error.retry_after_s is not None else ""
    remedy = f"; {REMEDIES[error.reason]}" if error.reason in REMEDIES else ""
    return f"{error.code}{reason}: {error.message}{retry}{remedy}"


def load(name: str, command: Deferred) -> Any:
    """Imports a command; a function becomes a typer command of that name.

    Raises:
        ModuleNotFoundError: a package that it needs is not installed.
    """
    module, _, attribute = command.target.partition(":")
    found = getattr(importlib.import_module(module), attribute)
    if isinstance(found, typer.Typer):
        return typer.main.get_command(found)
    app = new_app()
    app.command(name)(found)
    return typer.main.get_command(app)


def plugins(group: str, known: Mapping[str, tuple[str, str]]) -> dict[str, Deferred]:
    """Finds the commands that distributions register under an entry-point group, without importing them.

    An entry point carries neither help nor extra; `known` gives both for the names that we expect.
    """
    found = {}
    for entry in sorted(entry_points(group=group)):
        if entry.name in known:
            found[entry.name] = Deferred(entry.value, *known[entry.name])
        else:
            found[entry.name] = Deferred(entry.value, f"From {entry.dist.name}." if entry.dist else "")
    return found


def new_app(*, completion: bool = False, **settings: Any) -> typer.Typer:
    """Makes a typer app with the settings that all our commands share; only the root has the completion's options."""
    return typer.Typer(
        add_completion=completion,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        **settings,
    )
