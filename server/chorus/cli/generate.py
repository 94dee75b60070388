"""`chorus generate`: one completion from a running server, or a file of them (`cli.batch`)."""

import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chorus.cli.interrupt import cancelled_by_ctrl_c
from chorus.cli.lazy import new_app
from chorus.cli.options import (
    DEFAULT_SERVER,
    AdapterOption,
    ServerOption,
    TimeoutOption,
    sampling,
    token_ids,
    with_sampling_flags,
)
from chorus.cli.output import print_json
from chorus.cli.suggest import adapter_suggestions

if TYPE_CHECKING:
    from chorus.client import Completion, Prompt, Stream

EXAMPLES = """[bold]Examples[/bold]

  chorus generate --prompt "Once upon a time" --max-tokens 64 --stream

  chorus generate --adapter acme/support@canary --prompt "Hello" --temperature 0 --json

  chorus generate --messages '\\[{"role": "user", "content": "Where is my parcel?"}]' --n 3

  chorus generate --token-ids 1,2,3 --max-tokens 8 --logprobs 2 --json

  chorus generate --input in.jsonl --output out.jsonl --adapter acme/support --max-tokens 32"""

app = new_app()


@app.command(epilog=EXAMPLES)
@with_sampling_flags
def generate(
    *,
    server: ServerOption = DEFAULT_SERVER,
    adapter: AdapterOption = "",
    prompt: Annotated[str | None, typer.Option(help="The text to go on from.")] = None,
    token_ids: Annotated[str | None, typer.Option(metavar="1,2,3", help="Token ids instead of a text.")] = None,
    messages: Annotated[
        str | None, typer.Option(metavar="JSON", help='A dialogue: \\[{"role": "user", "content": "Hi"}].')
    ] = None,
    input: Annotated[
        Path | None,
        typer.Option(metavar="IN.jsonl", help="Many requests, one JSON object a line; the flags are their defaults."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="OUT.jsonl", help="Where their answers go, as they come; what it holds is not redone."),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=1024, help="Requests of --input at the same time.")] = 16,
    timeout: TimeoutOption = 60,
    priority: Annotated[int | None, typer.Option(help="Smaller runs earlier; 0 if not given.")] = None,
    request_id: Annotated[str | None, typer.Option(help="Your own id, to be found in the server's log.")] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print as it comes; with --json, one object per piece before the last.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the completion as one JSON object.")] = False,
    **flags: Any,
) -> None:
    """Ask a running server for a completion, or for a file of them."""
    asked = {"--prompt": prompt, "--token-ids": token_ids, "--messages": messages, "--input": input}
    if sum(value is not None for value in asked.values()) != 1:
        raise typer.BadParameter("give exactly one of them", param_hint=" / ".join(f"'{name}'" for name in asked))
    wishes = sampling(flags)
    if input is not None:
        one_only = {"--stream": stream, "--json": as_json, "--request-id": request_id}
        _refuse(one_only, "is for one request, not for --input")
        if output is None:
            raise typer.BadParameter("goes with --output OUT.jsonl", param_hint="'--input'")
        from chorus.cli.batch import run

        defaults = {"adapter": adapter or None, "priority": priority} | wishes
        run(input, output, server=server, concurrency=concurrency, timeout=timeout, defaults=defaults)
        return
    _refuse({"--output": output}, "goes with --input")
    question = _prompt(prompt, token_ids, messages)
    if not as_json:
        _refuse({"--logprobs": flags["logprobs"], "--prompt-logprobs": flags["prompt_logprobs"]}, "goes with --json")
    if stream and not as_json and (flags["n"] or 1) > 1:
        raise typer.BadParameter("several outputs mix; add --json", param_hint="'--stream'")

    # After the usage checks, and only here: grpc takes longer to import than to be refused.
    from chorus.client import Client

    with (
        Client(server, timeout=timeout) as client,
        adapter_suggestions(adapter, client.adapters),
        client.stream(question, adapter=adapter, priority=priority, request_id=request_id or "", **wishes) as answer,
        cancelled_by_ctrl_c(answer),
    ):
        if as_json:
            _answer_json(answer, pieces=stream)
        else:
            _answer_text(answer, pieces=stream and client.has_tokenizer)


def _refuse(flags: Mapping[str, object], why: str) -> None:
    for flag, value in flags.items():
        if value is not None and value is not False:
            raise typer.BadParameter(why, param_hint=f"'{flag}'")


def _prompt(prompt: str | None, ids: str | None, messages: str | None) -> "Prompt":
    if prompt is not None:
        return prompt
    if ids is not None:
        return token_ids(ids, "--token-ids")
    bad = partial(typer.BadParameter, param_hint="'--messages'")
    try:
        found = json.loads(messages or "")
    except ValueError:
        raise bad('must be JSON like [{"role": "user", "content": "Hi"}]') from None
    if not isinstance(found, list) or not found or not all(isinstance(item, dict) for item in found):
        raise bad('must be a list like [{"role": "user", "content": "Hi"}]')
    return found


def _answer_json(answer: "Stream", *, pieces: bool) -> None:
    for delta in answer:
        if pieces:
            which = {"index": delta.index} if delta.index else {}
            print_json({"delta": which | {"token_ids": delta.token_ids, "text": delta.text}})
    print_json(answer.result.to_json())


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
        _print_outputs(result)
    print(_summary(result), file=sys.stderr)


def _print_outputs(result: "Completion") -> None:
    for index, output in enumerate(result.outputs):
        if len(result.outputs) > 1:
            print(f"--- {index + 1} of {len(result.outputs)}: {output.finish_reason}")
        print(",".join(map(str, output.token_ids)) if output.text is None else output.text, flush=True)


def _summary(result: "Completion") -> str:
    usage, timing = result.usage, result.timing
    return (
        f"{', '.join(output.finish_reason for output in result.outputs)}: "
        f"{usage.prompt_tokens} + {usage.completion_tokens} tokens, "
        f"first after {timing.first_token:.3f} s, all after {timing.total:.3f} s, "
        f"by {result.version or 'the base model'}"
    )
