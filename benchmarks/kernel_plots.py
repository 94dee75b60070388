"""Draws what kernels.py measured last: decode attention over context; on a GPU, `low_rank` over rows.

    python benchmarks/kernel_plots.py [RESULTS.jsonl] [FOLDER]

Reads results/kernels.jsonl and writes results/kernels_attention.svg and, of a sweep, results/kernels_low_rank.svg.
"""

import json
import sys
from pathlib import Path

from charts import Chart, Points
from common import RESULTS
from tables import KINDS, Row, newest


def attention_chart(rows: list[Row], kind: str) -> Chart | None:
    """Milliseconds of all layers over tokens of context, a line for each contestant."""
    if (row := newest(rows, "paged_attention", kind)) is None:
        return None
    lines: dict[str, list[tuple[float, float]]] = {}
    for context, found in row["paged_attention"].items():
        for name, taken in found["seconds"].items():
            lines.setdefault(name, []).append((float(context), taken * 1e3))
    return Chart("Attention of 16 decodes", "tokens of context", "milliseconds", lines)


def low_rank_chart(rows: list[Row]) -> Chart | None:
    """Floor over time of the last sweep's cases whose rows all have an adapter of their own, a line for each shape."""
    swept = [row for row in rows if row.get("op") == "low_rank" and "case" in row]
    lines: dict[str, Points] = {}
    for row in (row for row in swept if row["run"] == swept[-1]["run"]):
        if row["adapters"] == row["rows"] and row["ranks"] == [16]:
            lines[row["shape"]] = [*lines.get(row["shape"], ()), (float(row["rows"]), row["floor_over_time"])]
    return Chart("low_rank, each row its own adapter of rank 16", "rows", "floor / time", lines) if lines else None


def main(results: Path, folder: Path) -> None:
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    attention = next((chart for kind in KINDS if (chart := attention_chart(rows, kind))), None)
    for name, chart in (("attention", attention), ("low_rank", low_rank_chart(rows))):
        if chart is not None:
            path = folder / f"kernels_{name}.svg"
            path.write_text(chart.svg())
            print(path)


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    main(given[0] if given else RESULTS / "kernels.jsonl", given[1] if len(given) > 1 else RESULTS)
