"""`chorus serve`: flags made from `ServerConfig`, and what is said once the server is ready."""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chorus import logs
from chorus.cli.lazy import new_app
from chorus.config import ConfigError, ServerConfig, load_config

if TYPE_CHECKING:
    from rich.table import Table

    from chorus.engine.memory import MemoryPlan
    from chorus.services.server import Endpoints

EXAMPLES = """[bold]Examples[/bold]

  chorus serve   [dim]# the embedded base model, on this machine's CPU[/dim]

  chorus serve --model ./llama --device cuda --dtype bfloat16 --kv-cache-mb 8192

  chorus serve --config server.yaml --print-config   [dim]# what would be served with[/dim]"""

# Of one parameter.
_BYTES = {"float32": 4, "bfloat16": 2}

app = new_app()


def with_config_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Gives `command` one option per field of `ServerConfig` in place of its `**flags`; options not given are None."""
    own = [p for p in inspect.signature(command).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    flags = []
    for name, field in ServerConfig.model_fields.items():
        default = "" if field.default is None else rf" [dim]\[default: {field.default}][/dim]"
        option = typer.Option(help=f"{field.description}{default}")
        kind: Any = field.annotation
        hint = Annotated[kind | None, option]
        flags.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint))
    command.__signature__ = inspect.Signature([*flags, *own])  # type: ignore[attr-defined]
    return command


@app.command(epilog=EXAMPLES)
@with_config_flags
def serve(
    *,
    config: Annotated[Path | None, typer.Option(metavar="FILE.yaml", help="Keys are the flags' names with _.")] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the configuration and exit.")] = False,
    **flags: Any,
) -> None:
    """Serve a base model and its tenants' adapters.

    Every flag may also be a CHORUS_* variable, or a key of the YAML file; the flag wins, then the variable.
    """
    try:
        settings = load_config({name: value for name, value in flags.items() if value is not None}, config)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None
    if print_config:
        print(_as_yaml(settings), end="")
        return

    logs.set_up(settings.log_format, settings.log_level)
    from chorus.services.server import serve as run

    code = run(settings, on_ready=lambda endpoints, memory: announce(settings, endpoints, memory))
    if code:
        # 70: the engine died. The log says of what.
        raise typer.Exit(code)


def announce(config: ServerConfig, endpoints: "Endpoints", memory: "MemoryPlan") -> None:
    """Says that the server is ready: a table for people on stderr, then one stable line on stdout for scripts."""
    from rich.console import Console

    # A log file has no width: no line is folded there.
    width = None if sys.stderr.isatty() else 1000
    stderr = Console(stderr=True, markup=False, highlight=False, quiet=config.log_format == "json", width=width)
    stderr.print(_summary(config, endpoints, memory))
    prompt = "--token-ids 1,2,3" if config.load_format == "dummy" else '--prompt "Once upon a time"'
    # Who listens on every address is reached at one of them.
    here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(endpoints.host, endpoints.host)
    call = f"chorus generate --server {_address(here, endpoints.port)} {prompt} --max-tokens 32"
    stderr.print(f"\nTry it:\n  {call}\n", soft_wrap=True)
    inference, admin, metrics = _addresses(endpoints)
    print(f"chorus ready inference={inference} admin={admin} metrics={metrics}", flush=True)


def _summary(config: ServerConfig, endpoints: "Endpoints", memory: "MemoryPlan") -> "Table":
    from rich.table import Table

    facts = endpoints.facts
    inference, admin, metrics = _addresses(endpoints)
    rows = {
        "model": f"{facts.name} ({facts.model_type}, {facts.parameter_count / 1e6:,.1f} M parameters)",
        "runs on": f"{config.device}, {facts.dtype}",
        "weights": f"about {facts.parameter_count * _BYTES[facts.dtype] / 2**20:,.0f} MiB",
        "keys, values": f"{config.kv_cache_mb} MiB, {memory.kv_blocks * memory.block_size:,} tokens",
        "adapters": f"{config.adapter_memory_mb} MiB, {memory.adapter_rows:,} rank rows at every site",
        "limits": f"context {facts.context_length}, rank {config.max_rank}, {config.max_rows} requests running, "
        f"{config.max_queue} waiting, {config.max_step_tokens} tokens a step",
        "state": endpoints.state_dir,
        "inference": inference,
        "admin": admin,
        "metrics": f"http://{metrics}/metrics",
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _addresses(endpoints: "Endpoints") -> tuple[str, str, str]:
    ports = endpoints.port, endpoints.admin_port, endpoints.metrics_port
    inference, admin, metrics = (_address(endpoints.host, port) for port in ports)
    return inference, admin, metrics


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _as_yaml(config: ServerConfig) -> str:
    import yaml

    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    return text
