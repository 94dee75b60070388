"""`chorus chat`: a dialogue with a running server, line by line, from a terminal or a pipe."""

import sys
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chorus.cli.lazy import new_app
from chorus.cli.options import (
    DEFAULT_SERVER,
    AdapterOption,
    ServerOption,
    TimeoutOption,
    sampling,
    with_sampling_flags,
)

if TYPE_CHECKING:
    from chorus.cli.dialogue import Dialogue

EXAMPLES = """[bold]Examples[/bold]

  chorus chat --adapter acme/support --temperature 0.7

  chorus chat --system "Answer in one sentence."

  printf 'Where is my parcel?\\n/adapter globex/help\\nWhere is my parcel?\\n' | chorus chat --adapter acme/support"""

# The server's default of 16 suits completions.
MAX_TOKENS = 256

app = new_app()


@app.command(epilog=EXAMPLES)
@partial(with_sampling_flags, without=("n", "logprobs", "prompt_logprobs"))
def chat(
    *,
    server: ServerOption = DEFAULT_SERVER,
    adapter: AdapterOption = "",
    system: Annotated[str, typer.Option(help="A system message to begin with.", show_default=False)] = "",
    timeout: TimeoutOption = 60,
    **flags: Any,
) -> None:
    """Talk with a running server. /help inside tells the commands; Ctrl-C stops an answer, Ctrl-D leaves.

    Answers go to stdout, all else to stderr. Without a terminal it exits 1 if any line failed.
    """
    wishes = sampling({"max_tokens": MAX_TOKENS} | {name: value for name, value in flags.items() if value is not None})

    from chorus.cli.dialogue import Dialogue
    from chorus.client import Client

    with Client(server, timeout=timeout) as client:
        # Nobody there is known before the first question.
        model = client.model()
        dialogue = Dialogue(client, wishes, system)
        if adapter:
            dialogue.switch(adapter)
        interactive = sys.stdin.isatty()
        if interactive:
            print(f"{model.name} at {server}; /help tells the commands, Ctrl-D leaves", file=sys.stderr)
            with dialogue.stopped_by_ctrl_c():
                failed = _talk(dialogue, interactive=True)
        else:
            failed = _talk(dialogue, interactive=False)
    if failed and not interactive:
        raise typer.Exit(1)


def _talk(dialogue: "Dialogue", *, interactive: bool) -> bool:
    """Reads and answers lines until the end; tells whether any failed."""
    failed = False
    while True:
        try:
            line = _read(f"{dialogue.adapter or 'base'}> ", interactive=interactive)
            if line is None or line.strip() == "/quit":
                return failed
            if line.strip():
                failed = not dialogue.take(line.strip()) or failed
        except KeyboardInterrupt:
            if not interactive:
                raise
            print("\n(Ctrl-D or /quit leaves)", file=sys.stderr)


def _read(prompt: str, *, interactive: bool) -> str | None:
    """Gives the next line, None at the end."""
    if not interactive:
        return sys.stdin.readline() or None
    with suppress(ImportError):
        # Editing and history of the line, where this Python has it.
        import readline  # noqa: F401
    try:
        return input(prompt)
    except EOFError:
        print(file=sys.stderr)
        return None
