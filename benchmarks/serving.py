"""S-LoRA's workload against a live server over gRPC, open loop: what adapters cost, and where it saturates.

    python benchmarks/serving.py [--adapters 0 1 50] [--rates 5 10 20 40] [--duration 8] [--alpha 0.3] [--cv 1] [--json]

For each rate, runs over no adapter, one and many take turns on one server. Every request is sent at its time, answered
or not the ones before it. Before that the highest rate for some seconds, then quiet, so that steps of most shapes have
been recorded; and first-token times on the idle server with the adapter cold, warm and hot. The
defaults fit two CPU cores and the embedded base; --model, --input, --output and the rest scale it up. Prints tables,
and with --json one JSON line last; each run is a row of results/serving.jsonl, drawn by serving_plots.py.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from chorus.client.aio import AsyncClient
from chorus.models.checkpoint import base_folder
from common import Others, or_toy, record, wait_until_quiet
from loads.distinct import write_adapter
from loads.figures import figures
from loads.live_server import LiveServer, live_server
from loads.open_loop import TENANT, adapter_name, replay
from loads.tiers import first_token_ms
from loads.trace import Workload

WARM_UP_S, REHEARSAL_S = 4.0, or_toy(2.0, 0.0)
COLUMNS = {
    "requests_s": "req/s",
    "output_tokens_s": "tok/s",
    "first_token_mean": "ftl mean",
    "first_token_p50": "p50",
    "first_token_p90": "p90",
    "first_token_p99": "p99",
    "inter_token_mean": "itl mean",
    "inter_token_p99": "itl p99",
    "attainment": "attain.",
    "satisfaction": "satisf.",
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--adapters", type=int, nargs="+", default=or_toy([0, 1, 50], [0, 1, 3]), help="how many, a run for each"
    )
    parser.add_argument(
        "--rates", type=float, nargs="+", default=or_toy([5.0, 10.0, 20.0, 40.0], [20.0]), help="requests/s"
    )
    parser.add_argument("--duration", type=float, default=or_toy(8.0, 0.5), help="seconds of arrivals in each run")
    parser.add_argument("--alpha", type=float, default=0.3, help="skew of the adapters; 1 is uniform, less is more")
    parser.add_argument("--cv", type=float, default=1.0, help="burstiness; 1 is Poisson")
    parser.add_argument("--input", type=int, nargs=2, default=[8, 128], metavar=("LOW", "HIGH"), help="prompt tokens")
    parser.add_argument("--output", type=int, nargs=2, default=[8, 128], metavar=("LOW", "HIGH"), help="new tokens")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8], help="of the adapters, in turn")
    parser.add_argument("--model", help="a base of the Llama shape; the embedded one if unset")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--adapter-memory-mb", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1, help="of a step; the client and gRPC need the other cores")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    return parser.parse_args()


def server_options(arguments: argparse.Namespace) -> list[str]:
    options = ["--device", arguments.device, "--threads", str(arguments.threads)]
    options += ["--adapter-memory-mb", str(arguments.adapter_memory_mb)]
    return [*options, *(["--model", arguments.model] if arguments.model else [])]


async def push(server: LiveServer, config: dict[str, int], folder: Path, count: int, ranks: list[int]) -> None:
    async with AsyncClient(server.inference, admin=server.admin) as client:
        for i in range(count):
            await client.push(
                write_adapter(config, folder / adapter_name(i), i, ranks), tenant=TENANT, name=adapter_name(i)
            )


def workload(arguments: argparse.Namespace, adapters: int, rate: float, duration: float) -> Workload:
    return Workload(
        rate=rate,
        duration=duration,
        adapters=adapters,
        alpha=arguments.alpha,
        cv=arguments.cv,
        tokens_in=tuple(arguments.input),
        tokens_out=tuple(arguments.output),
    )


async def measure(server: LiveServer, arguments: argparse.Namespace, vocabulary: int) -> list[dict[str, Any]]:
    """A row with first-token times by tier, then one for each run."""
    async with AsyncClient(server.inference, admin=server.admin) as client:
        known = list(range(max(arguments.adapters)))
        tiers = await first_token_ms(client, server.state_dir / "blobs", known, vocabulary)
        print("idle: " + ", ".join(f"{name} {value:.1f}" for name, value in tiers.items()), file=sys.stderr)
        rows: list[dict[str, Any]] = [{"kind": "tiers", **tiers}]
        print(f"{'rate':>6} {'n':>6} " + " ".join(f"{title:>8}" for title in COLUMNS.values()), file=sys.stderr)
        for adapters in arguments.adapters:
            warm_up = workload(arguments, adapters, max(arguments.rates), min(WARM_UP_S, arguments.duration))
            await replay(client, warm_up.arrivals(), vocabulary)
            await asyncio.sleep(REHEARSAL_S)
        for rate in arguments.rates:
            for adapters in arguments.adapters:
                arrivals = workload(arguments, adapters, rate, arguments.duration).arrivals()
                row = figures(await replay(client, arrivals, vocabulary))
                rows.append({"kind": "run", "rate": rate, "adapters": adapters, **row})
                shown = " ".join(f"{row.get(name, float('nan')):8.3f}" for name in COLUMNS)
                print(f"{rate:6.1f} {adapters:6} {shown}  {row['errors'] or ''}", file=sys.stderr)
        return rows


def tax(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of the highest rate: completed requests/s over so many adapters, relative to none."""
    runs = [row for row in rows if row["kind"] == "run" and row["completed"]]
    highest = max((row["rate"] for row in runs), default=0.0)
    speed = {row["adapters"]: row["requests_s"] for row in runs if row["rate"] == highest}
    return {f"requests_s_{n}_over_0": speed[n] / speed[0] for n in speed if n and 0 in speed}


def options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What all runs have in common."""
    return {key: value for key, value in vars(arguments).items() if key not in ("adapters", "rates", "json")}


def main() -> None:
    arguments = parse()
    wait_until_quiet()
    config = json.loads((base_folder(arguments.model) / "config.json").read_text())
    options = server_options(arguments)
    with tempfile.TemporaryDirectory() as name:
        state_dir = Path(name) / "state"
        with live_server(state_dir, *options) as server:
            count = max(arguments.adapters)
            asyncio.run(push(server, config, Path(name) / "adapters", count, arguments.ranks))
        with live_server(state_dir, *options) as server:  # anew: it has loaded no adapter
            others = Others()
            rows = asyncio.run(measure(server, arguments, config["vocab_size"]))
            common = {"others_cores": others.refuse(), **options_of(arguments)}
    run_id = int(time.time())
    for row in rows:
        record("serving", {"run": run_id, **common, **row})
    last = {"run": run_id, **rows[0], **tax(rows), "runs": len(rows) - 1}
    print(f"adapter tax at the highest rate: {tax(rows)}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(last))


if __name__ == "__main__":
    main()
