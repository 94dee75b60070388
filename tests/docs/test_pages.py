"""The pages say what the code does: every setting, every metric, every command line, every link."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from chorus.cli.main import app
from chorus.config import ServerConfig
from chorus.metrics import Metrics
from chorus.models import families
from chorus.trainer.config import DataConfig, LoopConfig, LoraSettings, TaskConfig

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, *languages: str) -> list[str]:
    return [
        code for language, code in re.findall(r"```(\w*)\n(.*?)```", page.read_text(), re.S) if language in languages
    ]


def command_lines() -> list[Any]:
    """Every `chorus ...` line of every page's shell blocks."""
    lines = [
        (page, line.split(" #")[0].strip())
        for page in PAGES
        for block in blocks(page, "", "bash")
        for line in block.splitlines()
        if line.startswith("chorus ")
    ]
    assert len(lines) > 10
    return [pytest.param(line, id=f"{page.name}: {line[:60]}") for page, line in lines]


@pytest.mark.parametrize("line", command_lines())
def test_every_command_line_is_understood(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsed by the command line itself, as typed: names, options and their types. Nothing runs."""
    monkeypatch.chdir(tmp_path)
    for folder in ("my-model", "my-adapter", "my-adapter-2"):
        Path(folder).mkdir()
    command, arguments = get_command(app), shlex.split(line)[1:]
    context = command.make_context("chorus", arguments, resilient_parsing=False)
    while True:
        rest = [*getattr(context, "_protected_args", []), *context.args]
        name, found, rest = command.resolve_command(context, rest)  # type: ignore[attr-defined]
        assert found is not None, line
        context = found.make_context(name, rest, parent=context)
        if not hasattr(found, "resolve_command"):
            return
        command = found


def inline(tool: str) -> list[str]:
    """The commands of `tool` that a page's text names, `like this`, without the tool."""
    prose = [re.sub(r"```.*?```", "", page.read_text(), flags=re.S) for page in PAGES]
    texts = {text for page in prose for text in re.findall(rf"`{tool}\s+([^`]+)`", page)}
    assert texts
    return [" ".join(text.split()) for text in sorted(texts)]


def test_every_setting_of_the_server_is_on_its_page() -> None:
    text = (ROOT / "docs/serving.md").read_text()
    for name in ServerConfig.model_fields:
        assert f"| `{name}` |" in text, name


@pytest.mark.parametrize(
    ("section", "model"), [("data", DataConfig), ("lora", LoraSettings), ("train", LoopConfig), ("task", TaskConfig)]
)
def test_every_setting_of_the_trainer_is_on_its_page(section: str, model: Any) -> None:
    text = (ROOT / "docs/training.md").read_text()
    for name in model.model_fields:
        assert f"| `{section}.{name}` |" in text, name


def test_every_metric_is_on_its_page_and_no_other() -> None:
    suffix = {"counter": "_total", "info": "_info"}
    names = {family.name + suffix.get(family.type, "") for family in Metrics().registry.collect()}
    assert set(re.findall(r"^\| `(chorus_\w+)`", (ROOT / "docs/operating.md").read_text(), re.M)) == names


def test_of_every_metric_the_page_says_what_it_means_and_what_to_make_of_it() -> None:
    rows = re.findall(r"^\| `chorus_\w+` \|(.*)\|$", (ROOT / "docs/operating.md").read_text(), re.M)
    for row in rows:
        assert all(cell.strip() for cell in row.split("|")), row


def test_the_table_of_families_is_fresh() -> None:
    assert (ROOT / "docs/families.md").read_text().endswith(families.markdown())


def test_readmes_tables_are_drawn_from_the_newest_results() -> None:
    command = [sys.executable, str(ROOT / "benchmarks/tables.py"), "--check"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readmes_tree_names_every_source_file_and_no_other() -> None:
    tree = (ROOT / "README.md").read_text().split("## Tree")[1]
    named: set[str] = set()
    folder = ""
    for line in re.findall(r"```\n(.*?)```", tree, re.S)[0].splitlines():
        entry = line.split("  ")[0] if not line.startswith(" ") else line.split()[0]
        if line.startswith(" "):
            named.add(folder + entry)
        elif entry.strip().endswith("/"):
            folder = entry.strip()
        elif entry.strip():
            named.add(entry.strip())
    rooms = {
        "protos": "*.proto",
        "protos/": "api_page.py",
        "kernels": "*.py",
        "server": "*.py",
        "trainer": "*.py",
        "benchmarks": "*.py",
    }
    sources = {
        str(path.relative_to(ROOT))
        for room, pattern in rooms.items()
        for path in (ROOT / room).rglob(pattern)
        if not path.name.endswith(("__init__.py", "_pb2.py", "_pb2_grpc.py"))
    }
    code = {name for name in named if name.endswith((".py", ".proto")) and not name.endswith("__init__.py")}
    assert code == sources
