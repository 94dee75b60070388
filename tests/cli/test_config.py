from pathlib import Path

import pytest
from pydantic import ValidationError

from chorus.config import ConfigError, ServerConfig, load_config


def file_with(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "server.yaml"
    path.write_text(text)
    return path


def test_flag_beats_variable_beats_file_beats_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file_with(tmp_path, "max_rank: 1\nmax_rows: 2\nmax_queue: 3\n")
    monkeypatch.setenv("CHORUS_MAX_RANK", "4")
    monkeypatch.setenv("CHORUS_MAX_ROWS", "5")
    config = load_config({"max_rank": 6}, path)
    assert (config.max_rank, config.max_rows, config.max_queue, config.port) == (6, 5, 3, 50051)


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHORUS_MODEL", "")
    assert load_config({}).model is None


def test_the_tests_own_variable_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHORUS_FAILPOINTS", "x=error")
    assert load_config({}) == ServerConfig()


@pytest.mark.parametrize(
    ("name", "said"),
    [("CHORUS_PROT", "CHORUS_PROT; did you mean 'CHORUS_PORT'?"), ("CHORUS_ZZZZZZZZZ", "variable CHORUS_Z")],
)
def test_an_unknown_variable_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str, said: str) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError) as caught:
        load_config({})
    assert said in str(caught.value)


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load_config({}, file_with(tmp_path, "# nothing\n")) == ServerConfig()


def test_each_bad_value_is_named_as_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHORUS_MAX_RANK", "many")
    path = file_with(tmp_path, "kv_cache_mb: 0\n")
    with pytest.raises(ConfigError) as caught:
        load_config({"admin_port": 70000}, path)
    flag, file, variable = sorted(str(caught.value).split("; "))
    assert flag.startswith("--admin-port: ")
    assert "70000" in flag
    assert variable.startswith("CHORUS_MAX_RANK: ")
    assert file.startswith(f"{path}: kv_cache_mb: ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot: 1\n", "unknown key 'prot'; did you mean 'port'?"),
        ("zzz: 1\n", "unknown key 'zzz'"),
        ("1: 1\n", "unknown key 1"),
        ("- port\n", "key: value"),
        ("port: [\n", "not YAML"),
        ("port: \x00", "not YAML"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = file_with(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config({}, path)
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: No such file"):
        load_config({}, tmp_path / "absent.yaml")


def test_a_configuration_never_changes() -> None:
    with pytest.raises(ValidationError):
        load_config({}).port = 1  # type: ignore[misc]
