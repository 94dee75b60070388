"""Completion in the shell, through the installed script, as bash asks for it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

Run = Callable[..., Result]


def complete(*words: str) -> list[str]:
    script = str(Path(sys.executable).with_name("chorus"))
    env = {"_CHORUS_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run([script], env={**os.environ, **env}, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("chorus", "gen"), ["generate"]),
        (("chorus", "adapters", "sh"), ["show"]),
        (("chorus", "generate", "--logp"), ["--logprobs"]),
    ],
)
def test_commands_and_flags_that_are_not_imported_yet_are_completed(
    words: tuple[str, ...], expected: list[str]
) -> None:
    assert complete(*words) == expected


def test_the_script_for_the_shell_that_asks_is_shown() -> None:
    asked = f"'{Path(sys.executable).with_name('chorus')}' --show-completion; exit $?"
    shown = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, timeout=60, check=True)
    assert "_CHORUS_COMPLETE" in shown.stdout


@pytest.mark.parametrize(
    "command",
    [
        ("serve",),
        ("generate",),
        ("chat",),
        ("score",),
        *(
            ("adapters", verb)
            for verb in ["push", "list", "show", "versions", "alias", "delete", "pin", "unpin", "residency"]
        ),
    ],
)
def test_every_commands_help_has_examples(run: Run, command: tuple[str, ...]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert f"chorus {' '.join(command)}" in result.stdout.partition("Examples")[2]


@pytest.mark.parametrize("command", ["train", "demo"])
def test_the_trainers_commands_help_has_examples_too(run: Run, command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: chorus {command}" in result.stdout
