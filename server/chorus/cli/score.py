"""`chorus score`: how likely continuations are."""

from typing import Annotated

import typer

from chorus.cli.lazy import new_app
from chorus.cli.options import DEFAULT_SERVER, AdapterOption, JsonOption, ServerOption, TimeoutOption
from chorus.cli.output import print_json, print_table
from chorus.cli.suggest import adapter_suggestions

EXAMPLES = """[bold]Examples[/bold]

  chorus score --prompt "The parcel is" --continuation " late" --continuation " here"

  chorus score --adapter acme/support --prompt "Hello" --continuation " there" --json"""

app = new_app()


@app.command(epilog=EXAMPLES)
def score(
    *,
    prompt: Annotated[str, typer.Option(help="The text before.")],
    continuation: Annotated[list[str], typer.Option(help="What may follow; may be repeated.")],
    server: ServerOption = DEFAULT_SERVER,
    adapter: AdapterOption = "",
    timeout: TimeoutOption = 60,
    as_json: JsonOption = False,
) -> None:
    """Tell how likely continuations of a prompt are: natural log-probabilities."""
    from chorus.client import Client

    with Client(server, timeout=timeout) as client, adapter_suggestions(adapter, client.adapters):
        found = client.score(prompt, continuation, adapter=adapter)
    if as_json:
        print_json(found)
        return
    rows = [
        (f"{one.logprob:.4f}", len(one.token_ids), text) for text, one in zip(continuation, found.scores, strict=True)
    ]
    print_table(("logprob", "tokens", "continuation"), rows, empty="no continuations")
