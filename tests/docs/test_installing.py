"""Every `pip install` that a page names, in an environment of its own that has no Chorus yet.

The packages that the tests run with are in sight there, so nothing is downloaded; pip still resolves every extra.
"""

import os
import shlex
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from docs.test_commands import command_lines
from docs.test_pages import PAGES, ROOT, inline

LINES = sorted(
    {line for page in PAGES for line in command_lines(page) if line.startswith("pip ")}
    | {f"pip {words}" for words in inline("pip")}
)
# A command that works only with what the line brings.
THEN = {
    "pip install .": ("generate", "--help"),
    "pip install '.[server]'": ("serve", "--print-config"),
    "pip install '.[trainer]'": ("train", "--help"),
}


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """The `bin` of a new environment. Of folders named in a .pth no .pth is read, so no editable Chorus is in sight."""
    venv.create(tmp_path / "venv", symlinks=True)
    [site] = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    return tmp_path / "venv/bin"


def run(*command: str | Path, folder: Path = ROOT) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("CHORUS_")}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("line", LINES)
def test_what_the_page_installs_is_there_and_answers(line: str, fresh: Path, tmp_path: Path) -> None:
    _, install, *what = shlex.split(line)
    run(fresh / "python", "-m", "pip", install, "--no-index", "--no-build-isolation", *what)
    where = Path(run(fresh / "python", "-c", "import chorus.client; print(chorus.client.__file__)", folder=tmp_path))
    assert where.is_relative_to(tmp_path / "venv")
    assert (where.parents[1] / "models/embedded/model.safetensors").is_file()
    assert "generate" in run(fresh / "chorus", "--help", folder=tmp_path)
    assert run(fresh / "chorus", *THEN[line], folder=tmp_path)
