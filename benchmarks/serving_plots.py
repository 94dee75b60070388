"""Draws what serving.py measured last: throughput and first-token latency over rate, tax over number of adapters.

    python benchmarks/serving_plots.py [RESULTS.jsonl] [FOLDER]

Reads results/serving.jsonl and writes results/serving_throughput.svg, serving_latency.svg and serving_tax.svg.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from charts import Chart, Points
from common import RESULTS

Row = dict[str, Any]


def last_runs(lines: Sequence[str]) -> list[Row]:
    """The runs that were measured together, last."""
    rows = [json.loads(line) for line in lines]
    last = max((row["run"] for row in rows), default=None)
    return [row for row in rows if row["run"] == last and row["kind"] == "run" and row["completed"]]


def over_rate(runs: list[Row], value: Callable[[Row], float]) -> dict[str, Points]:
    """A line for each number of adapters."""
    numbers = sorted({row["adapters"] for row in runs})
    return {
        "base" if not n else f"{n} adapter{'s' if n > 1 else ''}": sorted(
            (row["rate"], value(row)) for row in runs if row["adapters"] == n
        )
        for n in numbers
    }


def over_adapters(runs: list[Row]) -> dict[str, Points]:
    """Completed requests/s relative to none, a line for each rate."""
    lines: dict[str, Points] = {}
    for rate in sorted({row["rate"] for row in runs}):
        speed = {row["adapters"]: row["requests_s"] for row in runs if row["rate"] == rate}
        if 0 in speed:
            lines[f"{rate:g} req/s"] = sorted((n, speed[n] / speed[0]) for n in speed)
    return lines


def charts(runs: list[Row]) -> dict[str, Chart]:
    rate = "requests/s sent"
    return {
        "throughput": Chart(
            "Completed requests/s", rate, "requests/s", over_rate(runs, lambda row: float(row["requests_s"]))
        ),
        "latency": Chart(
            "First token, p99", rate, "milliseconds", over_rate(runs, lambda row: row["first_token_p99"] * 1e3)
        ),
        "tax": Chart("Adapter tax", "distinct adapters", "requests/s, base = 1", over_adapters(runs)),
    }


def main(results: Path, folder: Path) -> None:
    for name, chart in charts(last_runs(results.read_text().splitlines())).items():
        path = folder / f"serving_{name}.svg"
        path.write_text(chart.svg())
        print(path)


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    main(given[0] if given else RESULTS / "serving.jsonl", given[1] if len(given) > 1 else RESULTS)
