"""What adapters that are only registered cost: the steps of a server, and its start, with few and with many of them.

    python benchmarks/registered.py [--rounds 2] [--counts 1 100 10000] [--json]

A live server of the embedded base, 16 streams over the one adapter that is in use; the others are names of the same
content in its registry. The mean step comes from /metrics; the start ends with the line that says ready. Prints a table
and, with --json, one JSON line last; a row goes to results/registered.jsonl.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from chorus.adapters import records
from chorus.client.aio import AsyncClient
from chorus.models.checkpoint import base_folder
from common import Others, or_toy, record, wait_until_quiet
from loads.distinct import write_adapter
from loads.live_server import live_server, step_seconds
from loads.open_loop import TENANT, adapter_name

STREAMS, TOKENS = or_toy(16, 2), or_toy(200, 20)


def register(state_dir: Path, count: int) -> None:
    """Registers an adapter's content under so many more names: what a registry of so many is to a server."""
    tenant = state_dir / "registry" / TENANT
    first = records.from_json((tenant / f"{adapter_name(0)}.json").read_bytes(), adapter_name(0))
    for i in range(1, count):
        another = replace(first, name=replace(first.name, adapter=adapter_name(i)))
        (tenant / f"{adapter_name(i)}.json").write_bytes(records.to_json(another))


async def push(folder: Path, state_dir: Path) -> None:
    shape = json.loads((base_folder(None) / "config.json").read_text())
    with live_server(state_dir) as server:
        async with AsyncClient(server.inference, admin=server.admin) as client:
            await client.push(write_adapter(shape, folder / "adapter", 0, [8]), tenant=TENANT, name=adapter_name(0))


async def busy_step_ms(state_dir: Path) -> tuple[float, float]:
    """Mean milliseconds of a server's steps while streams over one adapter run, and the seconds until it was ready."""
    began = time.perf_counter()
    with live_server(state_dir, "--threads", "1") as server:
        ready = time.perf_counter() - began
        async with AsyncClient(server.inference, admin=server.admin) as client:
            await run_streams(client)
            before = step_seconds(server.metrics)
            await run_streams(client)
            spent, steps = (b - a for a, b in zip(before, step_seconds(server.metrics), strict=True))
    return spent / steps * 1e3, ready


async def run_streams(client: AsyncClient) -> None:
    adapter = f"{TENANT}/{adapter_name(0)}"
    calls = (
        client.generate([20 + i, *range(30, 60)], adapter=adapter, max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
        for i in range(STREAMS)
    )
    await asyncio.gather(*calls)


def registered_row(folder: Path, rounds: int, counts: Sequence[int]) -> dict[str, Any]:
    """The same traffic with so many adapters registered, in turns."""
    step: dict[str, list[float]] = {str(count): [] for count in counts}
    ready: dict[str, list[float]] = {str(count): [] for count in counts}
    states = {str(count): folder / f"state-{count}" for count in counts}
    for count, state_dir in zip(counts, states.values(), strict=True):
        asyncio.run(push(folder / f"of-{count}", state_dir))
        register(state_dir, count)
    for _ in range(rounds):
        for name, state_dir in states.items():
            ms, seconds = asyncio.run(busy_step_ms(state_dir))
            step[name].append(ms)
            ready[name].append(seconds)
    return {
        "step_ms": {name: statistics.median(values) for name, values in step.items()},
        "ready_s": {name: statistics.median(values) for name, values in ready.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=or_toy(2, 1))
    parser.add_argument(
        "--counts", type=int, nargs="+", default=or_toy([1, 100, 10_000], [2]), help="adapters registered"
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    arguments = parser.parse_args()
    wait_until_quiet()
    with tempfile.TemporaryDirectory() as name:
        others = Others()
        row = registered_row(Path(name), arguments.rounds, arguments.counts)
        row["others_cores"] = others.cores()
    for count, ms in row["step_ms"].items():
        print(f"{count:>6} registered {ms:8.2f} ms a step, ready in {row['ready_s'][count]:.1f} s", file=sys.stderr)
    record("registered", row)
    if arguments.json:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
