"""Draws README's tables from the newest rows of benchmarks/results/, each between its pair of markers.

    python benchmarks/tables.py [--check] [--readme README.md] [--results benchmarks/results]

The tables stand between `<!-- engine -->` and `<!-- /engine -->`, `<!-- kernels -->` and `<!-- /kernels -->`. With
--check nothing is written: exits with 1, naming what is stale.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from common import RESULTS

README = RESULTS.parents[1] / "README.md"
# Kinds of machines, each with tables of its own: GPUs, then CPUs by what they multiply bfloat16 with. A core of Zen 5
# begins two products of vectors a cycle, others one.
KINDS = ("cuda", "amx", "two vectors", "vectors", "float32")
ZEN_5 = " family 26 "
# A workload's name in a row, in the table, and who else does it, besides vLLM.
WORKLOADS = (
    ("base", "base", "transformers"),
    ("one", "1 adapter", "peft"),
    ("mixed8", "8 distinct adapters", "peft"),
    ("mixed16", "16 distinct adapters", "peft"),
)
LOW_RANK = "`low_rank`, 16 adapters of rank 16, all linears"

Row = dict[str, Any]


def newest(rows: Iterable[Row], key: str, kind: str) -> Row | None:
    """The last row that has the key, of a machine of this kind; rows are appended."""
    of_these = [row for row in rows if key in row and kind_of(row) == kind]
    return of_these[-1] if of_these else None


def kind_of(row: Row) -> str:
    """Of `KINDS` the one that a row was measured on; "float32" is where peers are best run in that."""
    if row["device"] == "cuda":
        return "cuda"
    if row.get("peer_dtype") == "float32":
        return "float32"
    if "amx_bf16" in row["cpu"]:
        return "amx"
    return "two vectors" if ZEN_5 in row["cpu"] else "vectors"


def engine_tables(rows: list[Row]) -> str:
    """A table for each kind of machine that has a row with peers."""
    found = [newest(rows, "base_over_transformers", kind) for kind in KINDS]
    return "\n\n".join(_engine_table(row) for row in found if row)


def _engine_table(row: Row) -> str:
    vllm = any(f"{workload}_vllm_tok_s" in row for workload, _, _ in WORKLOADS)
    ranges = " (range over pairs)" if any(key.endswith("_range") for key in row) else ""
    efficiency = any(f"decode_efficiency_{workload}" in row for workload, _, _ in WORKLOADS)
    peers = f"peer ({dtype})" if (dtype := row.get("peer_dtype", "bfloat16")) != "bfloat16" else "peer"
    header = [f"{_machine(row)}, tokens/s", "Chorus", peers, f"Chorus / peer{ranges}"]
    header += ["vLLM", "Chorus / vLLM"] if vllm else []
    header += ["decode step: floor/time"] if efficiency else []
    lines = []
    for workload, label, peer in WORKLOADS:
        theirs = row[f"{workload}_{peer}_tok_s"]
        cells = [label, f"{row[f'{workload}_tok_s']:.0f}", f"{theirs:.0f} ({peer})", _ratio(row, workload, peer)]
        cells += [_number(row, f"{workload}_vllm_tok_s", 0), _ratio(row, workload, "vllm")] if vllm else []
        cells += [_number(row, f"decode_efficiency_{workload}", 2)] if efficiency else []
        lines.append(cells)
    memory = f"Peak resident memory over weights and configured budgets: {row['rss_over_budgets_mb']:.0f} MB."
    return f"{_table(header, lines)}\n\n{memory} Commit {row['commit']}, {row['time'][:10]}."


def _ratio(row: Row, workload: str, peer: str) -> str:
    """Chorus over the peer; in parentheses the range over pairs of turns, where the row has it."""
    over = f"{workload}_over_{peer}"
    if f"{over}_range" not in row:
        return _number(row, over, 2)
    low, high = row[f"{over}_range"]
    return f"{row[over]:.2f} ({low:.2f}..{high:.2f})"


def _number(row: Row, key: str, digits: int) -> str:
    """Empty where the row does not have it."""
    return f"{row[key]:.{digits}f}" if key in row else ""


def kernel_tables(rows: list[Row]) -> str:
    """The operators, a table for each kind of machine; then the cases of the last sweep, if there was one."""
    tables = [_operator_table(rows, kind) for kind in KINDS]
    tables.append(_sweep_table(rows))
    return "\n\n".join(table for table in tables if table)


def _operator_table(rows: list[Row], kind: str) -> str:
    low_rank, attention = (newest(rows, op, kind) for op in ("low_rank", "paged_attention"))
    lines = [_operator(LOW_RANK, low_rank["low_rank"])] if low_rank else []
    for context, found in attention["paged_attention"].items() if attention else ():
        pages = f", pages of {attention['page']}" if attention and "page" in attention else ""
        lines.append(_operator(f"`paged_attention`, 16 decodes, {context} tokens{pages}", found))
    row = low_rank or attention
    if row is None:
        return ""
    read = f"{_machine(row)}, reads {row['read_gb_s']:.0f} GB/s"
    drawn = [row for row in (low_rank, attention) if row]
    commits = " and ".join(dict.fromkeys(f"{row['commit']}, {row['time'][:10]}" for row in drawn))
    others = "others, times ours" + (" (float32)" if kind == "float32" else "")
    header = [read, "time", "GB/s", "floor/time", others]
    return f"{_table(header, lines)}\n\nCommit {commits}."


def _operator(label: str, found: Row) -> list[str]:
    taken = f"{found['seconds']['chorus'] * 1e3:.2f} ms"
    return [label, taken, f"{found['gb_s']:.1f}", f"{found['floor_over_time']:.2f}", _others(found["seconds"])]


def _others(seconds: dict[str, float]) -> str:
    ours = seconds["chorus"]
    return ", ".join(f"{name} {taken / ours:.2f}" for name, taken in seconds.items() if name != "chorus")


def _sweep_table(rows: list[Row]) -> str:
    swept = [row for row in rows if "case" in row]
    if not swept:
        return ""
    last = [row for row in swept if row["run"] == swept[-1]["run"]]
    ops = dict.fromkeys(row["op"] for row in last)
    drawn = [_swept_operator(op, [row for row in last if row["op"] == op]) for op in ops]
    return "\n\n".join([*drawn, f"Commit {last[0]['commit']}, {last[0]['time'][:10]}."])


def _swept_operator(op: str, rows: list[Row]) -> str:
    lines = [
        [
            row["case"],
            f"{row['seconds']['chorus'] * 1e6:.1f} us",
            f"{row['floor'] * 1e6:.1f} us",
            f"{row['floor_over_time']:.2f}",
            _others(row["seconds"]),
        ]
        for row in rows
    ]
    header = [f"`{op}` on {_machine(rows[0])}", "time", "floor", "floor/time", "others, times ours"]
    return _table(header, lines)


def _machine(row: Row) -> str:
    return str(row["gpu"]) if row["device"] == "cuda" else f"{row['cores']} CPU cores ({row['cpu']})"


def _table(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines))


TABLES: dict[str, Callable[[list[Row]], str]] = {"engine": engine_tables, "kernels": kernel_tables}


def redraw(page: str, name: str, table: str) -> str:
    """The page with the table between its markers.

    Raises:
        ValueError: the page does not have each marker once, in order.
    """
    opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = page.partition(opening)
    _, _, after = rest.partition(closing)
    if page.count(opening) != 1 or page.count(closing) != 1 or closing not in rest:
        raise ValueError(f"want one {opening} and after it one {closing}")
    return f"{before}{opening}\n{table}\n{closing}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a table is stale")
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    page, stale = arguments.readme.read_text(), []
    for name, draw in TABLES.items():
        rows = [json.loads(line) for line in (arguments.results / f"{name}.jsonl").read_text().splitlines()]
        try:
            drawn = redraw(page, name, draw(rows))
        except ValueError as error:
            sys.exit(f"{arguments.readme}: {error}")
        if drawn != page:
            stale.append(name)
        page = drawn
    if not arguments.check:
        arguments.readme.write_text(page)
    elif stale:
        sys.exit(f"{arguments.readme}: stale: {', '.join(stale)}; run python benchmarks/tables.py")


if __name__ == "__main__":
    main()
