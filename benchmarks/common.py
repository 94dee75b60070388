"""What the benchmark scripts share: the shape, a quiet machine, ceilings, the results file.

With BENCHMARK_SMOKE=FOLDER a benchmark only shows that it runs: toy shapes, on however busy a machine, rows to
files in that folder. A variable and no flag, because contestants, which are processes of their own, are toys then too.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

T = TypeVar("T")

RESULTS = Path(__file__).parent / "results"
SMOKE = os.environ.get("BENCHMARK_SMOKE")
QUIET_WAIT_S = 120.0
# Cores that others may keep busy before a measurement is worthless.
QUIET_CORES = 0.4


def or_toy(full: T, toy: T) -> T:
    """What is measured with, or what shows that it runs."""
    return toy if SMOKE else full


# The 144M-parameter Llama shape that the peers' figures on CPU were taken with.
SHAPE_144M: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": or_toy(1024, 128),
    "num_hidden_layers": or_toy(12, 2),
    "num_attention_heads": or_toy(16, 8),
    "num_key_value_heads": 4,
    "head_dim": or_toy(64, 16),
    "intermediate_size": or_toy(2816, 256),
    "vocab_size": or_toy(8192, 512),
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
}


def wait_until_quiet(interval: float = 2.0) -> None:
    """Returns once nothing else has kept the cores busy for so many seconds; exits with a message if that does not
    come."""
    if SMOKE:
        return
    ended = time.monotonic() + QUIET_WAIT_S
    while (busy := psutil.cpu_percent(interval) / 100 * (psutil.cpu_count() or 1)) > QUIET_CORES:
        if time.monotonic() > ended:
            sys.exit(f"something else keeps {busy:.1f} cores busy: no figures from such a machine")


class Others:
    """How many cores processes that are not ours, nor of ours, have kept busy since this was made."""

    def __init__(self) -> None:
        self._began, self._spent = time.monotonic(), self._seconds()

    def cores(self) -> float:
        return (self._seconds() - self._spent) / (time.monotonic() - self._began)

    def refuse(self) -> float:
        """The cores; exits with a message if they make a measurement worthless."""
        if (cores := self.cores()) > QUIET_CORES and not SMOKE:
            sys.exit(f"something else kept {cores:.1f} cores busy meanwhile: no figures from such a machine")
        return cores

    @staticmethod
    def _seconds() -> float:
        times = psutil.cpu_times()
        me = psutil.Process()
        ours = sum(sum(process.cpu_times()[:4]) for process in (me, *me.children(recursive=True)))
        return float(times.user + times.system + times.nice - ours)


def median_seconds(work: Callable[[], object], repeats: int = 20) -> float:
    """Median wall seconds of one call, after two that are not counted."""
    times = []
    for i in range(or_toy(repeats, 1) + 2):
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if i >= 2:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def peer_dtype(device: str, dtype: torch.dtype = torch.bfloat16) -> torch.dtype:
    """In which dtype others are best given numbers of `dtype`: the same, but float32 for bfloat16 on a CPU where torch
    computes that several times faster."""
    from chorus.kernels.cpu_products import product_dtype  # vLLM's process, which has no Chorus, is told

    return product_dtype(dtype) if device == "cpu" else dtype


def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.empty(or_toy(2**28, 2**16), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / median_seconds(lambda: target.copy_(source), 5)


def read_bandwidth(device: str) -> float:
    """Bytes per second of a large product with a vector, or of a sum, which only read; the best median."""
    dtype = peer_dtype(device)
    source = torch.ones(16, or_toy(2**24, 2**12), dtype=dtype, device=device)
    vector = torch.ones(source.shape[1], 1, dtype=dtype, device=device)
    return source.nbytes / min(median_seconds(work, 13) for work in (lambda: source @ vector, source.sum) * 2)


def matmul_rate(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of a large square product."""
    size = or_toy(2048, 64)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: a @ b, 5)


def machine() -> dict[str, Any]:
    """Where and with what this was measured."""
    return {
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no", "--", ":/", f":(exclude){RESULTS}")),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu": _cpu_name(),
        "cores": psutil.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "python": platform.python_version(),
    }


def record(name: str, row: dict[str, Any]) -> None:
    """Appends a row, with the machine, to results/NAME.jsonl."""
    folder = Path(SMOKE) if SMOKE else RESULTS
    folder.mkdir(exist_ok=True)
    with (folder / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps({**row, **machine()}) + "\n")


def _cpu_name() -> str:
    """The model, its family, and which instructions it has for bfloat16; where AVX-512 is missing at all, that.

    A virtual machine's model says no more than the brand; of AMD's families 25 is Zen 3 and 4, 26 is Zen 5.
    """
    named = {"avx512_bf16", "amx_bf16"}
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines())
    except (OSError, ValueError):
        return platform.processor()
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    flags = set(fields.get("flags", "").split())
    lacks = [] if "avx512_bf16" in flags or "avx2" not in flags else [f"without {_missing(flags)}"]
    family = [f"family {fields['cpu family']}"] if "cpu family" in fields else []
    return " ".join([fields.get("model name", "?"), *family, *sorted(named & flags), *lacks])


def _missing(flags: set[str]) -> str:
    return "AVX512_BF16" if "avx512f" in flags else "AVX-512"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return done.stdout.strip()
