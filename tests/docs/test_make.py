"""Every make target that a page names runs somewhere: here, in CI, or on the machine that it is for."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from docs.test_pages import PAGES, ROOT, blocks, inline

NOT_RUN = {"gpu": "needs a GPU"}
# A recipe is one command, and that command is run as it stands by another test.
RECIPES = {
    "bench": "python benchmarks/engine.py --json",  # test_programs
    "demo": "chorus demo",  # e2e/test_demo
}
HERE = {"protos"}


def named() -> set[str]:
    """Targets after `make` in blocks and in text."""
    typed = [line.split(" #")[0] for page in PAGES for code in blocks(page, "", "bash") for line in code.splitlines()]
    lines = [line.removeprefix("make ") for line in typed if line.startswith("make ")] + inline("make")
    return {word for line in lines for word in shlex.split(line) if "=" not in word}


def make(*words: str, folder: Path = ROOT) -> str:
    """What make prints; it takes the environment for set up, and knows nothing of the make that runs these tests."""
    old = [word for stamp in ("setup", ".venv/.dev", ".venv/.trainer") for word in ("-o", stamp)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", *old, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def in_ci() -> set[str]:
    lines = re.findall(r"^\s*make (.+)$", (ROOT / ".ci/run").read_text(), re.M)
    return {word for line in lines for word in shlex.split(line)}


def test_every_target_that_a_page_names_is_run() -> None:
    assert {"demo", "test", "lint", "protos", "gpu"} <= named()
    assert named() <= {*in_ci(), *RECIPES, *HERE, *NOT_RUN}
    assert named() >= {*RECIPES, *HERE, *NOT_RUN}


def test_ci_runs_every_check_and_the_readmes_test_command() -> None:
    assert in_ci() >= {"lint", "types", "protos-check", "kernels-compile", "test"}


@pytest.mark.parametrize("target", RECIPES)
def test_a_recipe_is_the_command_that_another_test_runs(target: str) -> None:
    assert make("--dry-run", target).strip() == f".venv/bin/{RECIPES[target]}"


def test_the_gpu_target_is_one() -> None:
    assert "pytest -m gpu" in make("--dry-run", "gpu")


def test_make_protos_writes_what_is_committed(tmp_path: Path) -> None:
    for name in ("protos", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*_pb2*", "api.md", "__pycache__"))
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    make("protos", folder=tmp_path)
    committed = {path.relative_to(ROOT) for path in (ROOT / "protos").rglob("*_pb2*.py*") if path.suffix != ".pyc"}
    made = {path.relative_to(tmp_path) for path in (tmp_path / "protos").rglob("*_pb2*.py*") if path.suffix != ".pyc"}
    assert made == committed
    assert len(committed) >= 12
    for path in {*committed, Path("docs/api.md")}:
        assert (tmp_path / path).read_bytes() == (ROOT / path).read_bytes(), path
