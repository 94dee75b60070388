"""The command `chorus`: its commands' names and one-line help. Imports none of them."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Annotated, ClassVar

import typer

from chorus.cli.lazy import Deferred, LazyGroup, new_app, plugins

BUILT_IN = {
    "serve": Deferred("chorus.cli.serve:app", "Serve a base model and its tenants' adapters.", extra="server"),
    "generate": Deferred("chorus.cli.generate:app", "Ask a running server for a completion."),
    "chat": Deferred("chorus.cli.chat:app", "Talk with a running server, adapter by adapter."),
    "score": Deferred("chorus.cli.score:app", "Tell how likely continuations are."),
    "adapters": Deferred("chorus.cli.adapters:app", "Publish adapters and look after them."),
}
# What the trainer registers: help, and the extra that it needs.
PLUGINS = {
    "train": ("Train an adapter from a config file.", "trainer"),
    "demo": ("Train, serve and query three tenants' adapters, in minutes.", "trainer"),
}
EXAMPLES = """[bold]Examples[/bold]

  chorus serve

  chorus adapters push ./my-adapter --tenant acme --name support

  chorus generate --adapter acme/support --prompt "Hello" --stream

  chorus chat --adapter acme/support

  chorus --install-completion"""


class Commands(LazyGroup):
    """Ours come first in the help, and a plugin can not take the name of one."""

    deferred: ClassVar[Mapping[str, Deferred]] = BUILT_IN | plugins("chorus.commands", PLUGINS) | BUILT_IN


app = new_app(completion=True, cls=Commands, name="chorus", no_args_is_help=True, epilog=EXAMPLES)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"chorus {version('chorus-serve')}")
        raise typer.Exit


@app.callback()
def chorus(
    _version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """One frozen base model, many tenants' adapters, one batch."""


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="chorus")
