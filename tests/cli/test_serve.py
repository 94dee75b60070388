import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import Result

from chorus.config import ServerConfig
from chorus.errors import FailedPrecondition

Run = Callable[..., Result]
Serve = Callable[..., int]
FACTS = SimpleNamespace(name="tiny", model_type="llama", parameter_count=3_000_000, dtype="float32", context_length=512)

MEMORY = SimpleNamespace(kv_blocks=100, block_size=16, adapter_rows=4096)


def ports(host: str = "127.0.0.1") -> SimpleNamespace:
    """What the server tells once it listens."""
    return SimpleNamespace(host=host, port=7001, admin_port=7002, metrics_port=7003, facts=FACTS, state_dir="state")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Callable[[Serve], None]:
    """Puts a function in the place of `chorus.services.server.serve`."""

    def install(serve: Serve) -> None:
        module = types.ModuleType("chorus.services.server")
        vars(module)["serve"] = serve
        monkeypatch.setitem(sys.modules, "chorus.services.server", module)

    return install


def test_every_field_is_a_flag(server: Callable[[Serve], None], run: Run) -> None:
    seen: list[ServerConfig] = []

    def serve(config: ServerConfig, on_ready: object) -> int:
        seen.append(config)
        return 0

    server(serve)
    given: dict[str, Any] = {
        "model": "some/model",
        "device": "cuda",
        "dtype": "float32",
        "load_format": "dummy",
        "host": "0.0.0.0",
        "port": 1,
        "admin_port": 2,
        "metrics_port": 3,
        "state_dir": Path("elsewhere"),
        "kv_cache_mb": 4,
        "adapter_memory_mb": 5,
        "adapter_host_mb": 0,
        "max_rank": 6,
        "max_rows": 7,
        "threads": 8,
        "max_step_tokens": 18,
        "target_step_ms": 25.0,
        "prefix_cache": "request",
        "graphs": "off",
        "overlap": "off",
        "max_queue": 9,
        "max_message_mb": 10,
        "max_adapter_mb": 11,
        "stream_queue_tokens": 22,
        "drain_grace_s": 1.5,
        "log_format": "json",
        "log_level": "debug",
    }
    flags = [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", value)]
    assert run("serve", *flags).exit_code == 0
    assert seen[0].model_dump() == given


def test_help_tells_every_flag_with_its_default(run: Run) -> None:
    text = run("serve", "--help").stdout
    for name in ServerConfig.model_fields:
        assert f"--{name.replace('_', '-')}" in text
    assert "[default: 50051]" in text


def test_ready_is_one_line_on_stdout_and_the_rest_on_stderr(server: Callable[[Serve], None], run: Run) -> None:
    server(lambda config, on_ready: on_ready(ports(), MEMORY) or 0)
    result = run("serve")
    assert result.exit_code == 0
    assert result.stdout == "chorus ready inference=127.0.0.1:7001 admin=127.0.0.1:7002 metrics=127.0.0.1:7003\n"
    assert "tiny (llama, 3.0 M parameters)" in result.stderr
    assert "1,600 tokens" in result.stderr
    assert "4,096 rank rows" in result.stderr
    assert 'chorus generate --server 127.0.0.1:7001 --prompt "' in result.stderr


@pytest.mark.parametrize(
    ("host", "bound", "reached"),
    [
        ("0.0.0.0", "0.0.0.0:7001", "127.0.0.1:7001"),
        ("::", "[::]:7001", "[::1]:7001"),
        ("::1", "[::1]:7001", "[::1]:7001"),
    ],
)
def test_the_call_to_paste_reaches_a_server_that_listens_everywhere(
    server: Callable[[Serve], None], run: Run, host: str, bound: str, reached: str
) -> None:
    server(lambda config, on_ready: on_ready(ports(host), MEMORY) or 0)
    result = run("serve")
    assert f"inference={bound} " in result.stdout
    assert f"--server {reached} " in result.stderr


def test_print_config_is_yaml_that_config_takes_back(run: Run, tmp_path: Path) -> None:
    first = run("serve", "--print-config", "--port", 0, "--max-rank", 16)
    path = tmp_path / "server.yaml"
    path.write_text(first.stdout)
    second = run("serve", "--config", path, "--print-config")
    assert first.stdout == second.stdout
    assert yaml.safe_load(first.stdout)["max_rank"] == 16
    assert first.stderr == ""


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--port", "70000"), "--port"),
        (("--max-rank", "0"), "--max-rank"),
        (("--device", "tpu"), "--device"),
        (("--kv-cache-mb", "lots"), "--kv-cache-mb"),
        (("--config", "absent.yaml"), "absent.yaml"),
    ],
)
def test_a_bad_value_is_exit_2_and_one_line_naming_it(run: Run, flags: tuple[str, ...], named: str) -> None:
    result = run("serve", *flags)
    assert (result.exit_code, result.stdout) == (2, "")
    assert named in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_failed_start_is_exit_1_and_one_line(server: Callable[[Serve], None], run: Run) -> None:
    def serve(config: ServerConfig, on_ready: object) -> int:
        raise FailedPrecondition("127.0.0.1:50051 is taken", reason="PORT_TAKEN")

    server(serve)
    result = run("serve")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "chorus: FAILED_PRECONDITION (PORT_TAKEN): 127.0.0.1:50051 is taken\n"


def test_an_unreadable_state_dir_is_exit_1_and_one_line(server: Callable[[Serve], None], run: Run) -> None:
    def serve(config: ServerConfig, on_ready: object) -> int:
        raise PermissionError(13, "Permission denied", "/state")

    server(serve)
    result = run("serve")
    assert (result.exit_code, result.stderr) == (1, "chorus: Permission denied: /state\n")


def test_without_the_server_extra_it_is_named(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    # None in sys.modules is how Python says that a module can not be imported.
    monkeypatch.setitem(sys.modules, "chorus.services.server", None)
    result = run("serve")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "'chorus-serve[server]'" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_server_whose_engine_died_is_exit_70(server: Callable[[Serve], None], run: Run) -> None:
    server(lambda config, on_ready: 70)
    assert run("serve").exit_code == 70
