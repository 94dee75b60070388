"""Every command and every snippet of README and docs really runs, in a newcomer's folder, against a real server.

Installing, make targets and programs have files of their own beside this one.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from chorus.models import embedded
from docs.test_pages import PAGES, ROOT, blocks, inline
from support.scrape import Scrape
from support.server import CHORUS, ENVIRONMENT, READY, ServerProcess
from support.tiny import save_adapter

# Of a page's training only the first steps.
FEW_STEPS = ("--set", "train.steps=3")
CHAT = "Where is my parcel?\n/quit\n"
DOCUMENTED = [page for page in PAGES if any("chorus" in code for code in blocks(page, "", "bash", "python"))]


def command_lines(page: Path) -> list[str]:
    """What a reader would type; trees and make targets are no commands of ours."""
    text = "\n".join(blocks(page, "", "bash")).replace("\\\n", " ")
    return [line.split(" #")[0].strip() for line in text.splitlines() if re.match(r"(chorus|pip|curl|python) ", line)]


class Desk:
    """A newcomer's folder, and the server that runs beside it."""

    def __init__(self, folder: Path, server: ServerProcess) -> None:
        self.folder = folder
        self._server = server
        self._places = {
            "127.0.0.1:50051": server.inference,
            "127.0.0.1:50052": server.admin,
            "127.0.0.1:9400": server.metrics,
        }

    def run(self, line: str) -> None:
        """Runs one command line as it stands, but for addresses; it must succeed."""
        program, *words = shlex.split(self.here(line))
        if program == "curl":
            return self._look(self.here(line))
        match words[0]:
            case "serve" if "--print-config" not in words:
                return self._serve(words)
            case "train":
                words += FEW_STEPS
            case "adapters" if "--admin" not in words:
                words += ["--admin", self._server.admin]
            case "generate" | "chat" | "score" if "--server" not in words:
                words += ["--server", self._server.inference]
        self._succeed([*CHORUS, *words], CHAT if words[0] == "chat" else "")
        return None

    def run_program(self, code: str) -> None:
        if "async def main" in code:
            code += "\nimport asyncio\nasyncio.run(main())\n"
        self._succeed([sys.executable, "-c", self.here(code)], "")

    def here(self, text: str) -> str:
        for documented, real in self._places.items():
            text = text.replace(documented, real)
        return text

    def _look(self, line: str) -> None:
        """`curl -s URL | grep TEXT`; where there is no curl, the same URL is got without it."""
        if shutil.which("curl"):
            return self._succeed(["bash", "-o", "pipefail", "-c", line], "")
        parsed = re.fullmatch(r"curl -s http://(\S+)/metrics \| grep (\S+)", line)
        assert parsed is not None, line
        assert Scrape.of(parsed[1]).value(f"{parsed[2]}_count") >= 0
        return None

    def _succeed(self, command: list[str], stdin: str) -> None:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={**os.environ, **ENVIRONMENT, "NO_PROXY": "127.0.0.1"},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr

    def _serve(self, words: list[str]) -> None:
        """Until it is ready, and down again."""
        ports = ["--port", "0", "--admin-port", "0", "--metrics-port", "0"]
        with subprocess.Popen(
            [*CHORUS, *words, *ports],
            cwd=self.folder,
            env={**os.environ, **ENVIRONMENT},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            assert process.stdout is not None
            assert any(READY.match(line.strip()) for line in process.stdout)
            process.terminate()
            assert process.wait(30) == 0


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages take for granted: a model, two adapters, data, requests."""
    folder = tmp_path_factory.mktemp("scene")
    model = shutil.copytree(embedded.path(), folder / "my-model")
    save_adapter(model, folder / "my-adapter", 1, r=4, target_modules=["q_proj", "v_proj"])
    save_adapter(model, folder / "my-adapter-2", 2, r=8)
    examples = "".join(json.dumps({"prompt": f"Q{i} ", "completion": "yes"}) + "\n" for i in range(8))
    for name in ("train.jsonl", "valid.jsonl"):
        (folder / name).write_text(examples)
    (folder / "requests.jsonl").write_text('{"prompt": "My parcel"}\n{"prompt": "Hello", "max_tokens": 2}\n')
    return folder


@pytest.fixture(scope="module")
def server(scene: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """With an adapter that some pages push and others talk to."""
    with ServerProcess(tmp_path_factory.mktemp("server") / "state", "--model", str(scene / "my-model")) as server:
        with server.client() as client:
            client.push(scene / "my-adapter", tenant="acme", name="support")
        yield server


@pytest.mark.parametrize("page", DOCUMENTED, ids=lambda page: page.name)
def test_what_the_page_says_can_be_typed(page: Path, scene: Path, server: ServerProcess, tmp_path: Path) -> None:
    desk = Desk(shutil.copytree(scene, tmp_path / "desk"), server)
    for code in blocks(page, "yaml"):
        name = re.match(r"# (\S+\.yaml)", code)
        assert name is not None, code
        (desk.folder / name[1]).write_text(code)
    for line in command_lines(page):
        if not line.startswith("pip "):
            desk.run(line)
    for code in blocks(page, "python"):
        desk.run_program(code)


# e2e/conftest.py runs the first as it stands; the others are the line that it prints.
NOT_HERE = {"serve", "ready inference=127.0.0.1:50051 admin=127.0.0.1:50052 metrics=127.0.0.1:9400"}
NOT_HERE |= {"ready inference=HOST:PORT admin=HOST:PORT metrics=HOST:PORT"}


@pytest.mark.parametrize("words", [words for words in inline("chorus") if words not in NOT_HERE])
def test_what_a_pages_text_names_can_be_typed(words: str, scene: Path, server: ServerProcess, tmp_path: Path) -> None:
    with server.client() as client:
        [version, *_] = client.versions("acme/support")
    Desk(shutil.copytree(scene, tmp_path / "desk"), server).run(f"chorus {words}".replace("DIGEST", version.digest))


def test_pages_have_commands() -> None:
    lines = {line for page in PAGES for line in command_lines(page)}
    assert {line.split()[0] for line in lines} == {"chorus", "pip", "curl"}
    assert len(lines) > 12
    assert ROOT / "README.md" in DOCUMENTED
