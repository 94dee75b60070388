"""Compiles every kernel in every tuned configuration for GPUs that need not be here, and refuses the bad ones.

    python -m chorus.kernels.compile_report [--json] [--store FILE]

Bad is: registers spilled, more shared memory than the target has, a `tl.dot` that did not become a matrix instruction,
or no code at all. Registers and spills are read from the cubin's resource usage, or HIP's metadata.
What this does not know: whether a kernel is right (the interpreter's tests say so) or fast.
"""

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from chorus.kernels.compile_case import CompileCase

MODULES = (
    "chorus.kernels.low_rank_cases",
    "chorus.kernels.attention_cases",
    "chorus.kernels.pointwise_cases",
    "chorus.kernels.head_cases",
    "chorus.kernels.filtered_draw_cases",
)
PROCESSES = 2
_MATRIX_INSTRUCTION = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma)")


@dataclass(frozen=True, slots=True)
class Target:
    """A GPU to compile for. `arch` is what `tuning.arch_of` says on it; `shared_limit` is per program, in bytes."""

    arch: str
    backend: str
    gpu: int | str
    lanes: int
    shared_limit: int

    def triton_target(self) -> Any:
        return GPUTarget(self.backend, self.gpu, self.lanes)


# CUDA C++ programming guide, "Technical Specifications per Compute Capability"; CDNA3 ISA, "LDS".
TARGETS = (
    Target("sm80", "cuda", 80, 32, 163 * 1024),
    Target("sm90", "cuda", 90, 32, 227 * 1024),
    Target("sm100", "cuda", 100, 32, 227 * 1024),
    Target("hip", "hip", "gfx942", 64, 64 * 1024),
)


class Compiled(NamedTuple):
    """One row of the report. `spilled` in bytes on CUDA, in registers on HIP; `failure` is "" where all is well."""

    kernel: str
    configuration: str
    arch: str
    registers: int
    shared: int
    spilled: int
    matrix: str
    failure: str


def build(case: CompileCase, target: Target, *, debug: bool = False) -> Any:
    """Triton's compiled kernel; with `debug` its device assertions are in it."""
    arguments = list(case.kernel.arg_names)
    source = ASTSource(
        case.kernel,
        {name: case.signature.get(name, "constexpr") for name in arguments},
        dict(case.constants),
        {(arguments.index(name),): [["tt.divisibility", 16]] for name in case.aligned},
    )
    options = {"num_warps": case.warps, "num_stages": case.stages, "enable_fp_fusion": True, "debug": debug}
    return triton.compile(source, target=target.triton_target(), options=options)


def compile_case(case: CompileCase, target: Target) -> Compiled:
    """Compiles and judges one case. What the compiler refuses is a failure, not an exception."""
    try:
        built = build(case, target)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Compiled(case.name, case.configuration, target.arch, 0, 0, 0, "", f"does not compile: {reason}")
    text: str = built.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    registers, spilled = _cuda_registers(built.asm["cubin"]) if target.backend == "cuda" else _hip_registers(text)
    shared = int(built.metadata.shared)
    matrix = "+".join(sorted(set(_MATRIX_INSTRUCTION.findall(text))))
    failure = _failure(case, target, shared, spilled, matrix)
    return Compiled(case.name, case.configuration, target.arch, registers, shared, spilled, matrix, failure)


@cache
def cases_of(module: str, arch: str) -> tuple[CompileCase, ...]:
    """What a module with kernels wants compiled for an architecture."""
    return tuple(importlib.import_module(module).compile_cases(arch))


def compile_all(modules: Sequence[str] = MODULES) -> list[Compiled]:
    """Every case of the modules for every target, in two processes."""
    work = [(m, t, i) for m in modules for t in TARGETS for i in range(len(cases_of(m, t.arch)))]
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_compile_one, *zip(*work, strict=True), chunksize=8))


def summary(rows: Iterable[Compiled]) -> dict[str, int]:
    """The counts of the JSON line."""
    rows = list(rows)
    return {
        "kernels": len({row.kernel for row in rows}),
        "configs": len(rows),
        "spilled": sum(row.spilled > 0 for row in rows),
        "failed": sum(bool(row.failure) for row in rows),
    }


def stored_table(rows: Iterable[Compiled]) -> str:
    """A Markdown table: for each kernel and target the most that any of its configurations takes."""
    of: dict[tuple[str, str], list[Compiled]] = {}
    for row in rows:
        of.setdefault((row.kernel, row.arch), []).append(row)
    lines = [
        f"| {kernel} | {arch} | {len(own)} | {max(r.registers for r in own)} | {max(r.shared for r in own)} "
        f"| {max(r.spilled for r in own)} | {sum(bool(r.failure) for r in own)} |"
        for (kernel, arch), own in sorted(of.items())
    ]
    by = f"Written by `python -m chorus.kernels.compile_report --store FILE`, Triton {triton.__version__}."
    columns = "| kernel | target | configurations | registers | shared bytes | spilled | failed |"
    return "\n".join([by, "", columns, "|---" * 7 + "|", *lines, ""])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m chorus.kernels.compile_report", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON line of counts last")
    parser.add_argument("--store", metavar="FILE", type=Path, help="write the worst of each kernel on each target")
    options = parser.parse_args(arguments)
    rows = compile_all()
    print(f"{'kernel':14} {'target':6} {'regs':>4} {'shared':>7} {'spilled':>7}  {'matrix':16} configuration")
    for row in rows:
        line = f"{row.kernel:14} {row.arch:6} {row.registers:4} {row.shared:7} {row.spilled:7}  {row.matrix:16}"
        print(line, row.configuration, f"  FAILED: {row.failure}" if row.failure else "")
    counts = summary(rows)
    if options.store is not None:
        options.store.write_text(stored_table(rows))
    if options.json:
        print(json.dumps(counts))
    return 1 if counts["failed"] or not rows else 0


def _compile_one(module: str, target: Target, index: int) -> Compiled:
    return compile_case(cases_of(module, target.arch)[index], target)


def _failure(case: CompileCase, target: Target, shared: int, spilled: int, matrix: str) -> str:
    if spilled:
        return f"spills {spilled}"
    if shared > target.shared_limit:
        return f"needs {shared} bytes of shared memory, the target has {target.shared_limit}"
    if case.expects_dot and not matrix:
        return "a dot did not become a matrix instruction"
    return ""


def _cuda_registers(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and the bytes of its stack: kernels have no local arrays, so only spills lie there."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", binary]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {said}")
    return int(found[1]), int(found[2])


def _hip_registers(assembly: str) -> tuple[int, int]:
    """Vector registers of a thread, and how many vector and scalar registers were spilled."""
    found = dict(re.findall(r"^\s*\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", assembly, re.MULTILINE))
    return int(found["vgpr_count"]), int(found["vgpr_spill_count"]) + int(found["sgpr_spill_count"])


if __name__ == "__main__":
    sys.exit(main())
