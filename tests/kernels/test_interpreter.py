"""The tests that interpret Triton kernels, in processes of their own, which they need; two, for two cores."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreter"


@pytest.mark.timeout(600)
def test_kernels_are_right_in_the_interpreter() -> None:
    """Without Triton this fails: nothing is skipped."""
    files = set(FOLDER.glob("test_*.py"))
    low_rank = set(FOLDER.glob("test_low_rank*.py"))
    running = [interpret(sorted(part)) for part in (low_rank, files - low_rank)]
    for process, said in [(process, process.communicate(timeout=580)[0]) for process in running]:
        last = (said.strip().splitlines() or [""])[-1]
        assert process.returncode == 0, said
        assert "passed" in last
        assert "skipped" not in last


def interpret(files: list[Path]) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "pytest", *map(str, files), "-q", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
