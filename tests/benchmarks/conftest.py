"""The benchmarks are scripts: their folder goes on the path, last, without the script that libraries would import."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
sys.modules["kernels"] = None  # type: ignore[assignment]
