"""How a step's time grows: with rows, with the sum of the rows' ranks, with adapters that are there and idle.

    python benchmarks/growth.py [--rounds 3] [--json]

The engine alone, the 144M Llama shape with random weights in bf16: median decode steps of 1 to 64 rows of the base; of
16 rows over 16 distinct adapters of rank 8 to 32; and of 16 rows of the base before those 48 adapters are there and
after, each time in turns with an engine whose pool has next to no rows. Of two engines one is always a few percent
faster, by where its weights lie, so what idle adapters cost is how much the ratio of the two has grown. Lines are
fitted to the first two. Prints tables, and with --json one JSON line last; a row goes to results/growth.jsonl.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from chorus import allocator
from chorus.config import ServerConfig
from chorus.engine import messages as m
from chorus.engine.engine import Engine
from common import SHAPE_144M, Others, or_toy, record, wait_until_quiet
from loads.alone import alone, load_adapters
from loads.decodes import decode_ms
from loads.distinct import write_adapter

ROWS, RANKS = or_toy((1, 4, 8, 16, 32, 64), (1, 4)), or_toy((8, 16, 32), (8, 16))
AT_ONCE = or_toy(16, 2)


def line(xs: Sequence[float], ys: Sequence[float]) -> dict[str, float]:
    """Least squares of relative errors: what it costs at 0, for each one more, and how far the worst point is off."""
    x, y = np.array(xs, dtype=float), np.array(ys)
    (fixed, each), *_ = np.linalg.lstsq(np.stack([1 / y, x / y], axis=1), np.ones_like(y), rcond=None)
    return {"fixed": float(fixed), "each": float(each), "worst": float(np.max(np.abs((fixed + each * x) / y - 1)))}


def in_turns(rounds: int, measured: dict[str, Callable[[], float]]) -> dict[str, float]:
    """The median of each, one a round, all in turns; the first round is a warm-up."""
    got: dict[str, list[float]] = {name: [] for name in measured}
    for turn in range(rounds + 1):
        for name, measure in measured.items():
            value = measure()
            if turn:
                got[name].append(value)
    return {name: statistics.median(values) for name, values in got.items()}


def of_shape(folder: Path, adapter_memory_mb: int) -> tuple[Engine, Any]:
    (folder / "config.json").write_text(json.dumps(SHAPE_144M))
    config = ServerConfig(
        model=str(folder), load_format="dummy", kv_cache_mb=256, adapter_memory_mb=adapter_memory_mb, max_rows=64
    )
    engine, base, _ = alone(config)
    return engine, base


def engine_row(folder: Path, rounds: int) -> dict[str, Any]:
    """Steps over rows and ranks, and what a full pool costs who does not use it."""
    engine, base = of_shape(folder, 800)
    bare, _ = of_shape(folder, 8)
    nobody: list[m.AdapterRef | None] = [None]

    def beside_bare(name: str) -> dict[str, float]:
        pools = {name: engine, "bare": bare}
        return in_turns(4 * rounds, {name: partial(decode_ms, it, nobody * AT_ONCE) for name, it in pools.items()})

    before = beside_bare("empty")
    folders = [write_adapter(SHAPE_144M, folder / f"{rank}-{i}", i, [rank]) for rank in RANKS for i in range(AT_ONCE)]
    refs, _ = load_adapters(engine, base, folders)
    of_rank = {rank: refs[i * AT_ONCE : (i + 1) * AT_ONCE] for i, rank in enumerate(RANKS)}
    rows = in_turns(rounds, {str(n): partial(decode_ms, engine, nobody * n) for n in ROWS})
    ranks = in_turns(rounds, {str(r * AT_ONCE): partial(decode_ms, engine, them) for r, them in of_rank.items()})
    after = beside_bare("full")
    engine.close()
    bare.close()
    return {
        "rows_ms": rows,
        "rows_line_ms": line([float(n) for n in rows], list(rows.values())),
        "rank_sum_ms": ranks,
        "rank_sum_line_ms": line([float(n) for n in ranks], list(ranks.values())),
        "idle_pool_ms": {"before": before, "after": after},
        "idle_pool_ratio": after["full"] / after["bare"] / (before["empty"] / before["bare"]),
        "idle_adapters": len(refs),
    }


def show(row: dict[str, Any]) -> None:
    for title, name in (("rows of the base", "rows"), ("sum of 16 rows' ranks", "rank_sum")):
        fit = row[f"{name}_line_ms"]
        print(f"{title}: {fit['fixed']:.2f} ms + {fit['each']:.4f} ms each, off by {fit['worst']:.0%}", file=sys.stderr)
        for count, ms in row[f"{name}_ms"].items():
            fitted = fit["fixed"] + fit["each"] * int(count)
            print(f"  {count:>6} {ms:8.2f} ms   {fitted:8.2f}", file=sys.stderr)
    print(f"16 rows of the base with {row['idle_adapters']} adapters idle:", file=sys.stderr)
    for when, ms in row["idle_pool_ms"].items():
        print(f"  {when}: " + ", ".join(f"{name} {value:.2f} ms" for name, value in ms.items()), file=sys.stderr)
    print(f"  {row['idle_pool_ratio']:.3f} times what it was before", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=or_toy(3, 1))
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    arguments = parser.parse_args()
    wait_until_quiet()
    with tempfile.TemporaryDirectory() as name:
        others = Others()
        row = engine_row(Path(name), arguments.rounds)
        row["others_cores"] = others.cores()
    show(row)
    record("growth", row)
    if arguments.json:
        print(json.dumps(row))


if __name__ == "__main__":
    allocator.start_again()  # as a server's engine
    main()
