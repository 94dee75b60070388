"""Every Python program that a page names really runs, as the page types it; benchmarks on toy shapes."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from docs.test_pages import ROOT, inline
from support.server import ENVIRONMENT

# Twenty processes that import torch, two programs at a time: about a minute, more on a busy machine.
pytestmark = pytest.mark.timeout(600)
NOT_RUN = {
    "benchmarks/peers/vllm_venv.py": "downloads vLLM and a torch of its own, gigabytes",
    "benchmarks/kernels.py --device cuda": "needs a GPU; make gpu runs it on a machine that has one",
    "benchmarks/decode_8b.py --device cuda": "the same",
}
MEASURED = ("engine", "front_end", "growth", "kernels", "pointwise", "registered", "serving", "startup")
ADAPTERS, REQUESTS = (0, 1, 3), 10
# What makes a run short, or keeps it from what is committed; and everything that a live run can be told.
BESIDES = {
    "chorus.trainer.pretrain": "--steps 2 --heldout 0",
    "benchmarks/tables.py": "--readme README.md",
    "benchmarks/serving.py": "--adapters 0 1 3 --rates 20 --duration 0.5 --alpha 0.6 --cv 2 --input 8 16 --output 4 8 "
    "--ranks 4 8 --device cpu --adapter-memory-mb 64 --threads 1",
}
Row = dict[str, Any]


class Runs:
    """All programs have run, in a folder that holds what they wrote."""

    def __init__(self, folder: Path, lines: list[str]) -> None:
        self.folder = folder
        (folder / "README.md").write_text((ROOT / "README.md").read_text().replace("| base |", "| stale |"))
        with ThreadPoolExecutor(2) as threads:
            self._done = dict(zip(lines, threads.map(self._run, lines), strict=True))

    def __getitem__(self, line: str) -> "subprocess.CompletedProcess[str]":
        return self._done[line]

    def rows(self, name: str) -> list[Row]:
        return [json.loads(line) for line in (self.folder / f"{name}.jsonl").read_text().splitlines()]

    def _run(self, line: str) -> "subprocess.CompletedProcess[str]":
        words = line.replace("DIR", str(self.folder / "model")).split()
        program = words[1] if words[0] == "-m" else words[0]
        if words[0] != "-m":
            words[0] = str(ROOT / program)
        command = [sys.executable, *words, *BESIDES.get(program, "").split()]
        environment = {**os.environ, **ENVIRONMENT, "BENCHMARK_SMOKE": str(self.folder)}
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=280, check=False
        )


LINES = [line for line in inline("python") if line not in NOT_RUN]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("programs"), LINES)


def test_what_is_not_run_is_on_a_page() -> None:
    assert set(inline("python")) == {*LINES, *NOT_RUN}
    assert len(LINES) >= 9


@pytest.mark.parametrize("line", LINES)
def test_the_program_does_what_the_page_says(line: str, runs: Runs) -> None:
    done = runs[line]
    assert done.returncode == 0, done.stderr
    if "--json" in line:
        assert json.loads(done.stdout.splitlines()[-1])
    elif "pretrain" not in line:
        assert done.stdout or done.stderr or "tables" in line


@pytest.mark.parametrize("name", MEASURED)
def test_a_benchmark_adds_to_the_results_with_commit_and_versions(name: str, runs: Runs) -> None:
    for row in runs.rows(name):
        assert {"commit", "time", "cpu", "versions"} <= row.keys()


def test_tables_are_drawn_into_the_readme(runs: Runs) -> None:
    assert (runs.folder / "README.md").read_text() == (ROOT / "README.md").read_text()


def test_a_pretrained_model_says_what_it_was_made_with(runs: Runs) -> None:
    made = json.loads((runs.folder / "model/PROVENANCE.json").read_text())
    assert made["recipe"]["steps"] == 2
    assert (runs.folder / "model/model.safetensors").stat().st_size > 1e6


def test_the_serving_benchmark_tells_every_figure_for_each_number_of_adapters(runs: Runs) -> None:
    tiers, *measured = runs.rows("serving")
    assert {f"first_token_{tier}_ms" for tier in ("cold", "warm", "hot", "base")} <= tiers.keys()
    assert [(run["adapters"], run["requests"], run["completed"]) for run in measured] == [
        (adapters, REQUESTS, REQUESTS) for adapters in ADAPTERS
    ]
    assert {"first_token_p99", "inter_token_mean", "output_tokens_s", "satisfaction"} <= measured[0].keys()
    assert "ftl mean" in runs["benchmarks/serving.py"].stderr
    assert "requests_s_3_over_0" in runs["benchmarks/serving.py"].stderr
