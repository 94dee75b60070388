"""`chorus generate`: one completion from a running server."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from chorus.cli.lazy import new_app
from chorus.cli.output import print_json

if TYPE_CHECKING:
    from chorus.client import Completion, Stream

EXAMPLES = """[bold]Examples[/bold]

  chorus generate --prompt "Once upon a time" --max-tokens 64 --stream

  chorus generate --adapter acme/support@canary --prompt "Hello" --temperature 0 --json

  chorus generate --token-ids 1,2,3 --max-tokens 8 --ignore-eos --json"""

app = new_app()


@app.command(epilog=EXAMPLES)
def generate(
    *,
    server: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the server listens.")] = "127.0.0.1:50051",
    adapter: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="tenants/T/adapters/A, T/A for short, @ALIAS or /versions/DIGEST after it; the base model if omitted.",
            show_default=False,
        ),
    ] = "",
    prompt: Annotated[str | None, typer.Option(help="The text to go on from.")] = None,
    token_ids: Annotated[str | None, typer.Option(metavar="1,2,3", help="Token ids instead of a text.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="New tokens at most; the server's default is 16.")] = None,
    min_tokens: Annotated[int | None, typer.Option(help="No end before this many tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; the server's default is 1.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the smallest set of tokens with this mass.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop tokens under this fraction of the likeliest one's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same prompt, same version: same tokens.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    stop_token_ids: Annotated[str | None, typer.Option(metavar="1,2,3", help="End after any of these tokens.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end-of-sequence token.")] = False,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Give up after this long.")] = 60,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print as it comes; with --json, one object per piece before the last.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the completion as one JSON object.")] = False,
) -> None:
    """Ask a running server for a completion."""
    if (prompt is None) == (token_ids is None):
        raise typer.BadParameter("give exactly one of them", param_hint="'--prompt' / '--token-ids'")
    question = prompt if prompt is not None else _ids(token_ids, "--token-ids")

    # After the usage checks, and only here: grpc takes longer to import than to be refused.
    from chorus.client import Client

    with (
        Client(server, timeout=timeout) as client,
        client.stream(
            question,
            adapter=adapter,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop=stop,
            stop_token_ids=_ids(stop_token_ids, "--stop-token-ids") or None,
            ignore_eos=ignore_eos or None,
        ) as answer,
    ):
        if as_json:
            _answer_json(answer, pieces=stream)
        else:
            _answer_text(answer, pieces=stream and client.has_tokenizer)


def _answer_json(answer: "Stream", *, pieces: bool) -> None:
    for delta in answer:
        if pieces:
            print_json({"delta": {"token_ids": delta.token_ids, "text": delta.text}})
    print_json(answer.result)


def _answer_text(answer: "Stream", *, pieces: bool) -> None:
    try:
        for delta in answer:
            if pieces:
                print(delta.text, end="", flush=True)
    finally:
        if pieces:
            print(flush=True)
    result = answer.result
    if not pieces:
        print(",".join(map(str, result.token_ids)) if result.text is None else result.text, flush=True)
    print(_summary(result), file=sys.stderr)


def _summary(result: "Completion") -> str:
    usage, timing = result.usage, result.timing
    return (
        f"{result.finish_reason}: {usage.prompt_tokens} + {usage.completion_tokens} tokens, "
        f"first after {timing.first_token:.3f} s, all after {timing.total:.3f} s, "
        f"by {result.version or 'the base model'}"
    )


def _ids(text: str | None, flag: str) -> list[int]:
    try:
        return [int(item) for item in text.split(",")] if text else []
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers like 1,2,3", param_hint=f"'{flag}'") from None
