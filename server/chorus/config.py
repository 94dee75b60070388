"""The server's configuration: one pydantic model, validated once, never changed after start.

Precedence: command-line flag, then `CHORUS_*` environment variable, then the YAML file, then the default. Each field
below is all four at once: `chorus serve` makes its flags from it.
"""

import os
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

ENV_PREFIX = "CHORUS_"


class ConfigError(ValueError):
    """A value that can not be used; the text says where it came from (flag, variable, file) and is one line."""


class ServerConfig(BaseModel):
    """What `chorus serve` can be told. Ports may be 0: any free port, printed at start."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(
        default=None, description="Local folder or hub id of the base model; the embedded base if unset."
    )
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="Where the base model and the adapters live.")
    dtype: Literal["float32", "bfloat16"] = Field(default="bfloat16", description="Type of weights and activations.")
    load_format: Literal["auto", "dummy"] = Field(
        default="auto", description="dummy: random weights of the config's shape."
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on, for all three ports.")
    port: int = Field(default=50051, ge=0, le=65535, description="Port of chorus.v1.Inference.")
    admin_port: int = Field(default=50052, ge=0, le=65535, description="Port of chorus.admin.v1.Adapters.")
    metrics_port: int = Field(default=9400, ge=0, le=65535, description="Port of Prometheus' /metrics.")
    state_dir: Path = Field(
        default=Path("chorus-state"), description="Where the registry and the adapters' files are kept."
    )

    kv_cache_mb: int = Field(default=512, ge=1, description="Memory for keys and values, MiB.")
    adapter_memory_mb: int = Field(default=256, ge=1, description="Memory for adapters on the device, MiB.")
    adapter_host_mb: int = Field(
        default=256, ge=0, description="Host memory for copies of adapters, read again only without one, MiB."
    )
    max_rank: int = Field(default=128, ge=1, le=1024, description="The largest adapter rank accepted.")
    max_rows: int = Field(default=64, ge=1, le=4096, description="Requests that run at the same time, at most.")
    threads: int | None = Field(
        default=None, ge=1, le=256, description="CPU threads of a step; torch's own choice if unset."
    )
    max_step_tokens: int = Field(
        default=512, ge=16, le=65536, description="Tokens of one step, at most; longer prompts split."
    )
    target_step_ms: float | None = Field(
        default=None,
        gt=0,
        le=60000,
        description="A step with streams under way takes about this long, ms: prompts split further.",
    )
    prefix_cache: Literal["tenant", "request"] = Field(
        default="tenant", description="Who finds a prompt's keys and values again; request: its own outputs alone."
    )
    graphs: Literal["auto", "off"] = Field(
        default="auto",
        description="auto: steps of few tokens are recorded and replayed, as CUDA graphs on cuda, as tapes on cpu.",
    )
    overlap: Literal["auto", "off"] = Field(
        default="auto", description="auto: a step is laid out while another computes, where the device is cuda."
    )
    max_queue: int = Field(default=1024, ge=1, description="Requests that wait, at most; more are refused.")
    max_message_mb: int = Field(default=64, ge=1, le=1024, description="The largest gRPC message, MiB.")
    max_adapter_mb: int = Field(default=1024, ge=1, description="The largest adapter upload, MiB.")
    stream_queue_tokens: int = Field(
        default=4096, ge=16, description="Unread tokens of a stream, at most; a slower reader ends."
    )
    drain_grace_s: float = Field(
        default=30.0, ge=0, le=86400, description="Grace for running requests at SIGTERM, seconds."
    )
    log_format: Literal["text", "json"] = Field(default="text", description="json: one object a line, on stderr.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="The least important lines that are logged."
    )


def load_config(flags: Mapping[str, Any], config_file: Path | None = None) -> ServerConfig:
    """Builds the configuration; `flags` holds only what was given on the command line.

    Raises:
        ConfigError: a value out of range or of the wrong type, an unknown key or variable, a file that is not there.
    """
    from_file = _read_yaml(config_file) if config_file is not None else {}
    _refuse_unknown_variables()
    variables = {name: os.environ.get(f"{ENV_PREFIX}{name.upper()}", "") for name in ServerConfig.model_fields}
    from_environment = {name: value for name, value in variables.items() if value}
    try:
        return ServerConfig.model_validate({**from_file, **from_environment, **flags})
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            name = str(problem["loc"][0])
            if name in flags:
                origin = flag_of(name)
            elif name in from_environment:
                origin = f"{ENV_PREFIX}{name.upper()}"
            else:
                origin = f"{config_file}: {name}"
            problems.append(f"{origin}: {problem['msg']}, not {problem['input']!r}")
        raise ConfigError("; ".join(problems)) from None


# Not configuration of the server: set by tests alone.
OTHER_VARIABLES = frozenset({"CHORUS_FAILPOINTS"})


def _refuse_unknown_variables() -> None:
    known = {f"{ENV_PREFIX}{name.upper()}" for name in ServerConfig.model_fields}
    for name in sorted(os.environ):
        if name.startswith(ENV_PREFIX) and name not in known | OTHER_VARIABLES:
            raise ConfigError(f"unknown variable {name}{_suggestion(name, known)}")


def _suggestion(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def flag_of(field: str) -> str:
    """Gives the command-line flag of a field."""
    return f"--{field.replace('_', '-')}"


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold `key: value` lines")
    for key in content:
        if key not in ServerConfig.model_fields:
            raise ConfigError(f"{path}: unknown key {key!r}{_suggestion(str(key), ServerConfig.model_fields)}")
    return content
