import resource
import subprocess
import sys
import types
from collections.abc import Callable

import pytest
import typer
from typer.testing import CliRunner, Result

from chorus.cli.lazy import Deferred, LazyGroup, load, new_app, plugins

Run = Callable[..., Result]
Chorus = Callable[..., "subprocess.CompletedProcess[str]"]
COMMANDS = ("serve", "generate", "chat", "score", "adapters", "train", "demo")


def one_line(text: str) -> str:
    [line] = text.splitlines()
    assert line.startswith("chorus: ")
    return line


def group_of(**commands: Deferred) -> typer.Typer:
    group = new_app(cls=type("Group", (LazyGroup,), {"deferred": commands}), name="chorus")
    group.callback()(lambda: None)
    return group


def test_help_names_every_command(run: Run) -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert all(command in result.stdout for command in COMMANDS)
    assert "chorus generate --adapter" in result.stdout


def test_no_arguments_show_the_help_and_are_wrong_usage(chorus: Chorus) -> None:
    done = chorus()
    assert (done.returncode, done.stderr) == (2, "")
    assert "Usage" in done.stdout


def test_version_is_printed(run: Run) -> None:
    assert run("--version").stdout.startswith("chorus 0.")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom chorus.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'transformers', 'grpc', 'pydantic', 'yaml', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_takes_little_more_than_importing_grpc(chorus: Chorus) -> None:
    # Processor time, and the best of three in turns, as machines differ, and this one may be busy with other things.
    def seconds(work: Callable[[], object]) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        work()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def import_grpc() -> None:
        subprocess.run([sys.executable, "-c", "import grpc.aio"], check=True, timeout=60)

    assert chorus("--help").returncode == 0
    taken = [(seconds(lambda: chorus("--help")), seconds(import_grpc)) for _ in range(3)]
    assert min(ours for ours, _ in taken) < 3 * min(grpcs for _, grpcs in taken)


@pytest.mark.parametrize(
    "args", [("nonsense",), ("generate", "--nonsense"), ("adapters", "push"), ("adapters", "nonsense"), ("--nonsense",)]
)
def test_wrong_usage_is_exit_2_and_one_line(run: Run, args: tuple[str, ...]) -> None:
    result = run(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--help" in one_line(result.stderr)


def test_a_typo_is_pointed_out(run: Run) -> None:
    assert "'generate'" in run("generat").stderr


def test_a_commands_own_help_is_shown(run: Run) -> None:
    result = run("generate", "--help")
    assert result.exit_code == 0
    assert "--token-ids" in result.stdout


def test_the_console_script_fails_with_one_line_and_empty_stdout(chorus: Chorus) -> None:
    done = chorus("generate", "--server", "127.0.0.1:1", "--prompt", "hi", "--json")
    assert (done.returncode, done.stdout) == (1, "")
    assert one_line(done.stderr).startswith("chorus: UNAVAILABLE (UNREACHABLE): no answer from 127.0.0.1:1")


def test_a_command_without_its_extra_names_the_extra() -> None:
    app = group_of(train=Deferred("a_package_nobody_has:train", "Train.", extra="trainer"))
    runner = CliRunner()
    assert "Train." in runner.invoke(app, ["--help"]).stdout
    result = runner.invoke(app, ["train", "x.yaml"])
    assert (result.exit_code, result.stdout) == (1, "")
    line = one_line(result.stderr)
    assert "a_package_nobody_has" in line
    assert "'chorus-serve[trainer]'" in line


def test_a_package_missing_only_once_the_command_runs_names_the_extra_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def train() -> None:
        import a_package_nobody_has  # type: ignore[import-not-found]  # noqa: F401

    _module(monkeypatch, train=train)
    result = CliRunner().invoke(group_of(train=Deferred("fake_plugin:train", "", extra="trainer")), ["train"])
    assert result.exit_code == 1
    assert "'chorus-serve[trainer]'" in one_line(result.stderr)


def test_a_plain_function_becomes_a_command_with_its_own_options(monkeypatch: pytest.MonkeyPatch) -> None:
    def greet(name: str, times: int = 1) -> None:
        print(f"hello {name} " * times)

    _module(monkeypatch, greet=greet)
    app = group_of(hail=Deferred("fake_plugin:greet", "Greets."))
    result = CliRunner().invoke(app, ["hail", "you", "--times", "2"])
    assert (result.exit_code, result.stdout) == (0, "hello you hello you \n")


def test_a_typer_app_becomes_a_command_group(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = new_app()
    inner.command("one")(lambda: print("1"))
    inner.command("two")(lambda: print("2"))
    _module(monkeypatch, inner=inner)
    result = CliRunner().invoke(group_of(many=Deferred("fake_plugin:inner", "")), ["many", "two"])
    assert (result.exit_code, result.stdout) == (0, "2\n")


def test_the_trainers_commands_are_found_but_not_imported() -> None:
    found = plugins("chorus.commands", {"train": ("Train an adapter.", "trainer")})
    assert found["train"] == Deferred("chorus.trainer.command:train", "Train an adapter.", "trainer")
    assert found["demo"].extra is None


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "chorus: interrupted"),
        (FileNotFoundError(2, "No such file", "x.yaml"), 1, "chorus: No such file: x.yaml"),
        (OSError("the disk\nis gone"), 1, "chorus: the disk is gone"),
        (typer.Abort(), 1, "chorus: aborted"),
    ],
)
def test_what_a_command_raises_becomes_an_exit_code_and_one_line(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, line: str
) -> None:
    def fail() -> None:
        raise error

    _module(monkeypatch, fail=fail)
    result = CliRunner().invoke(group_of(fail=Deferred("fake_plugin:fail", "")), ["fail"])
    assert (result.exit_code, result.stdout, one_line(result.stderr)) == (status, "", line)


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise KeyError("bug")

    _module(monkeypatch, fail=fail)
    with pytest.raises(KeyError):
        CliRunner().invoke(group_of(fail=Deferred("fake_plugin:fail", "")), ["fail"], catch_exceptions=False)


def test_the_names_commands_load_are_there() -> None:
    for name, target in (("serve", "serve"), ("generate", "generate"), ("adapters", "adapters")):
        assert load(name, Deferred(f"chorus.cli.{target}:app", "")) is not None


def _module(monkeypatch: pytest.MonkeyPatch, **contents: object) -> None:
    module = types.ModuleType("fake_plugin")
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, "fake_plugin", module)
