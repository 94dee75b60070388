"""Tiles as a CPU with vectors of the other width has them: 16 lanes where this one has 8, 8 where it has 16.

Run as a program, this is pytest in a process that takes its CPU for another one; LLVM makes of a vector what it has.
Code that is kept for this CPU is none of its business: it has a folder of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

FILES = ("test_native_low_rank.py", "test_paged_attention.py", "test_widened_linear.py")
CASES = "low_rank or widened or all_tokens and 80"  # of heads of 80 numbers: not whole vectors of pairs


def test_tiles_are_right_at_the_other_width(tmp_path: Path) -> None:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, __file__], check=False, capture_output=True, text=True, timeout=280, env=environment
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "passed" in done.stdout


def pretend() -> None:
    """That the CPU has vectors of the other width, and no products of bfloat16."""
    import numba
    from llvmlite import binding

    numba.njit(lambda: None)()  # by now numba knows what it compiles for
    has = binding.get_host_cpu_features
    known = dict(has())
    pretended = known | {"avx512f": not known.get("avx512f"), "avx512bf16": False, "amx-bf16": False}
    binding.get_host_cpu_features = lambda: pretended
    from chorus.kernels.native import vectors

    for feature in ("avx512bf16", "amx-bf16", "fma"):
        vectors.cpu_has(feature)  # remembers it
    binding.get_host_cpu_features = has
    assert (8 if known.get("avx512f") else 16) == vectors.LANES


if __name__ == "__main__":
    import pytest

    pretend()
    folder = Path(__file__).parent
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", CASES, *(str(folder / name) for name in FILES)]))
