"""The tests that interpret Triton kernels, in the process of their own that they need."""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = str(Path(__file__).parent / "interpreter")


def test_kernels_are_right_in_the_interpreter() -> None:
    """Without Triton this fails: nothing is skipped."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", FOLDER, "-q", "-p", "no:cacheprovider"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)
    last = (ran.stdout.strip().splitlines() or [""])[-1]
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "passed" in last
    assert "skipped" not in last
