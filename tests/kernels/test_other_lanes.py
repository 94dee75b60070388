"""Tiles as other CPUs have them: with vectors of the other width, 16 lanes where this one has 8, 8 where it has 16,
which LLVM makes of what there is; and where this one has AMX, without it.

Run as a program, this is pytest in a process that takes its CPU for another one. Code that is kept for this CPU is none
of its business: it has a folder of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

OF_THE_OTHER_WIDTH, WITHOUT_AMX = "of the other width", "without AMX"
FILES = {
    OF_THE_OTHER_WIDTH: ("test_native_low_rank.py", "test_paged_attention.py", "test_widened_linear.py"),
    WITHOUT_AMX: ("test_packed_linear.py",),
}
CASES = {
    # Of heads of 80 numbers: not whole vectors of pairs.
    OF_THE_OTHER_WIDTH: "low_rank or widened or all_tokens and 80",
    WITHOUT_AMX: "",
}


def passes(kind: str, folder: Path, **variables: str) -> str:
    """What pytest says there."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(folder)} | variables
    command = [sys.executable, __file__, kind]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "passed" in done.stdout
    return done.stdout


def test_tiles_are_right_at_the_other_width(tmp_path: Path) -> None:
    passes(OF_THE_OTHER_WIDTH, tmp_path)


def test_linears_are_right_without_amx(tmp_path: Path) -> None:
    from chorus.kernels.native.amx_tile import cpu_has_tiles  # not before `pretend`

    if not cpu_has_tiles():
        pytest.skip("needs a CPU with AMX: on others this is what they do")
    assert "skipped" not in passes(WITHOUT_AMX, tmp_path, ONEDNN_MAX_CPU_ISA="AVX512_CORE_BF16")


def pretend(kind: str) -> None:
    """That the CPU has vectors of the other width and no products of bfloat16; or all that it has but for AMX."""
    import numba
    from llvmlite import binding

    numba.njit(lambda: None)()  # by now numba knows what it compiles for
    has = binding.get_host_cpu_features
    known = dict(has())
    pretended = known | {"amx-bf16": False}
    if kind == OF_THE_OTHER_WIDTH:
        pretended |= {"avx512f": not known.get("avx512f"), "avx512bf16": False}
    binding.get_host_cpu_features = lambda: pretended
    from chorus.kernels.native import vectors

    for feature in ("avx512bf16", "amx-bf16", "fma"):
        vectors.cpu_has(feature)  # remembers it
    binding.get_host_cpu_features = has
    assert (16 if pretended.get("avx512f") else 8) == vectors.LANES


if __name__ == "__main__":
    pretend(kind := sys.argv[1])
    files = [str(Path(__file__).parent / name) for name in FILES[kind]]
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", CASES[kind], *files]))
