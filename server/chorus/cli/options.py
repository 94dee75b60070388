"""Options that several commands share: where the server is, which adapter, how tokens are drawn."""

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

if TYPE_CHECKING:
    from chorus.client import Sampling

DEFAULT_SERVER = "127.0.0.1:50051"
DEFAULT_ADMIN = "127.0.0.1:50052"

ServerOption = Annotated[str, typer.Option("--server", metavar="HOST:PORT", help="Where the server listens.")]
AdapterOption = Annotated[
    str,
    typer.Option(
        "--adapter",
        metavar="NAME",
        help="tenants/T/adapters/A, T/A for short, @ALIAS or /versions/DIGEST after it; the base model if omitted.",
        show_default=False,
    ),
]
TimeoutOption = Annotated[float, typer.Option("--timeout", metavar="SECONDS", help="Give up after this long.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]

# Name, type on the command line, metavar (None: the type's own), help. The names are those of SamplingParams.
SAMPLING: tuple[tuple[str, Any, str | None, str], ...] = (
    ("max_tokens", int, None, "New tokens at most; the server's default is 16."),
    ("min_tokens", int, None, "No end before this many tokens."),
    ("temperature", float, None, "0 is greedy; the server's default is 1."),
    ("top_k", int, None, "Keep the k likeliest tokens."),
    ("top_p", float, None, "Keep the smallest set of tokens with this mass."),
    ("min_p", float, None, "Drop tokens under this fraction of the likeliest one's."),
    ("presence_penalty", float, None, "Take this off the logit of each token in the output."),
    ("frequency_penalty", float, None, "Take it off once for each time the token is in the output."),
    ("repetition_penalty", float, None, "Make tokens of prompt and output less likely; 1 is off."),
    ("logit_bias", list[str], "ID=BIAS", "Add to this token's logit; may be repeated."),
    ("seed", int, None, "Same seed, same prompt, same version: same tokens."),
    ("stop", list[str], None, "End before this text; may be repeated."),
    ("stop_token_ids", str, "1,2,3", "End after any of these tokens."),
    ("ignore_eos", bool, None, "Go on past the end-of-sequence token."),
    ("n", int, None, "How many outputs; output i draws with seed + i."),
    ("logprobs", int, None, "Give each token's log-probability, and those of the likeliest this many; with --json."),
    ("prompt_logprobs", int, None, "The same for the prompt's tokens."),
)


def with_sampling_flags(command: Callable[..., None], *, without: tuple[str, ...] = ()) -> Callable[..., None]:
    """Gives `command` one option for each sampling parameter in place of its `**flags`; read them with `sampling`."""
    own = [p for p in inspect.signature(command).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    flags = []
    for name, kind, metavar, text in SAMPLING:
        if name not in without:
            of: Any = kind
            option = typer.Option(f"--{name.replace('_', '-')}", metavar=metavar, help=text)
            hint = Annotated[of | None, option]
            flags.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint))
    command.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined]
    return command


def sampling(flags: Mapping[str, Any]) -> "Sampling":
    """Gives the parameters that were named on the command line; wrong usage for a list that is none."""
    given = {name: value for name, value in flags.items() if value not in (None, [])}
    if "stop_token_ids" in given:
        given["stop_token_ids"] = token_ids(given["stop_token_ids"], "--stop-token-ids")
    if "logit_bias" in given:
        given["logit_bias"] = dict(map(_bias, given["logit_bias"]))
    return cast("Sampling", given)


def token_ids(text: str, flag: str) -> list[int]:
    """Reads `1,2,3`."""
    try:
        return [int(item) for item in text.split(",")] if text else []
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers like 1,2,3", param_hint=f"'{flag}'") from None


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not like 7=-5", param_hint="'--logit-bias'") from None
