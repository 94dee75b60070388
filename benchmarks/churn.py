"""What adapters that come and go cost those that decode: inter-token times with and without them, in turns.

    python benchmarks/churn.py [--rounds 5] [--streams 4] [--per-second 10] [--json]

A live server of the embedded base whose adapter memory holds few. Streams decode over the base and an adapter that
stays; meanwhile a client in another process asks for a token of others:

    visit   one that is on the device
    host    each has to be loaded and evicts one, and comes from its copy in host memory
    disk    the same with more of them than host memory has room for, each of which is read and checked again

Prints p50 and p99 of the times between a stream's messages, and with --json one JSON line last; a row goes to
results/churn.jsonl.
"""

import argparse
import asyncio
import itertools
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from chorus.client.aio import AsyncClient
from chorus.models.checkpoint import base_folder
from common import Others, record, wait_until_quiet
from loads.distinct import write_adapter
from loads.live_server import live_server
from loads.open_loop import TENANT, adapter_name

RANK, TOKENS = 8, 900
PASSING = {"visit": range(1, 2), "host": range(2, 6), "disk": range(6, 18)}
MEMORY_MB, HOST_MB = 1, 2  # three adapters of the embedded base; seven copies
SOURCES = ("host", "disk")


async def decode(client: AsyncClient, streams: int) -> list[float]:
    """Seconds between messages of streams that all run at once; half of them have the adapter that stays."""

    async def one(i: int) -> list[float]:
        adapter = f"{TENANT}/{adapter_name(0)}" if i % 2 else ""
        prompt = [20 + i, *range(30, 60)]
        async with client.stream(
            prompt, adapter=adapter, max_tokens=TOKENS, temperature=0.0, ignore_eos=True
        ) as answer:
            times = [time.perf_counter() async for _ in answer]
        return [after - before for before, after in itertools.pairwise(times)]

    return [gap for gaps in await asyncio.gather(*(one(i) for i in range(streams))) for gap in gaps]


def come_and_go(server: str, per_second: float, pipe: Connection) -> None:
    """The other client. Says when it is there.

    It is told which adapters come and go. It asks for a token of each, says so, and goes on with one after the other
    until the next word, at least once. It ends with None.
    """

    async def ask() -> None:
        async with AsyncClient(server) as client:

            async def visit(number: int) -> None:
                began = time.perf_counter()
                await client.generate([20, 21], adapter=f"{TENANT}/{adapter_name(number)}", max_tokens=1)
                await asyncio.sleep(max(1 / per_second - (time.perf_counter() - began), 0))

            pipe.send("ready")
            while numbers := pipe.recv():
                for number in numbers:
                    await visit(number)
                pipe.send("begun")
                for number in itertools.cycle(numbers):
                    await visit(number)
                    if pipe.poll():
                        break
                pipe.recv()
                pipe.send("ended")

    asyncio.run(ask())


@contextmanager
def passing(server: str, per_second: float) -> Iterator[Connection]:
    """Who comes and goes, in a process of its own: it is not they who decode, and must not keep their event loop."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=come_and_go, args=(server, per_second, theirs))
    process.start()
    theirs.close()  # the only other end is the process's: if that dies, reading from it fails
    try:
        ours.recv()
        yield ours
        ours.send(None)
    finally:
        ours.close()
        process.join()


async def measure(client: AsyncClient, others: Connection, metrics: str, rounds: int, streams: int) -> dict[str, Any]:
    """p50 and p99 of a quiet server and with each sort of visitors, in turns, and what these are times the first."""
    gaps: dict[str, list[list[float]]] = {which: [] for which in ("quiet", *PASSING)}
    loads = {which: dict.fromkeys(SOURCES, 0.0) for which in PASSING}
    seconds = dict.fromkeys(PASSING, 0.0)

    async def told(word: object) -> None:
        others.send(word)
        await asyncio.to_thread(others.recv)

    for turn in range(rounds + 1):
        quiet = await decode(client, streams)
        for which, numbers in PASSING.items():
            await told(numbers)
            before, began = loads_so_far(metrics), time.perf_counter()
            disturbed = await decode(client, streams)
            await told("stop")
            if turn:  # in the first, steps are recorded
                seconds[which] += time.perf_counter() - began
                for source, count in loads_so_far(metrics).items():
                    loads[which][source] += count - before[source]
                gaps[which].append(disturbed)
        if turn:
            gaps["quiet"].append(quiet)
    row: dict[str, Any] = {"loads": loads}
    for which in PASSING:
        if wrong := [source for source in SOURCES if loads[which][source] and source != which]:
            sys.exit(f"{which}: versions came from {wrong[0]}: {loads[which]}")
        row[f"{which}_loads_per_second"] = sum(loads[which].values()) / seconds[which]
    for which, times in gaps.items():
        for percent in (50, 99):
            row[f"{which}_p{percent}_ms"] = statistics.median(float(np.percentile(t, percent)) for t in times) * 1e3
            row[f"{which}_p{percent}_ratio"] = row[f"{which}_p{percent}_ms"] / row[f"quiet_p{percent}_ms"]
    return row


def loads_so_far(address: str) -> dict[str, float]:
    """How many versions have come to the device, by where from."""
    text = urllib.request.urlopen(f"http://{address}/metrics", timeout=10).read().decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("chorus_adapter_loads_total"))
    return {source: float(values[f'chorus_adapter_loads_total{{source="{source}"}}']) for source in SOURCES}


async def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    shape = json.loads((base_folder(None) / "config.json").read_text())
    options = ("--adapter-memory-mb", str(MEMORY_MB), "--adapter-host-mb", str(HOST_MB), "--threads", "1")
    with live_server(folder / "state", *options) as server:
        async with AsyncClient(server.inference, admin=server.admin) as client:
            for i in (0, *itertools.chain(*PASSING.values())):
                path = write_adapter(shape, folder / adapter_name(i), i, [RANK])
                pushed = await client.push(path, tenant=TENANT, name=adapter_name(i))
                if i == 0:
                    await client.pin(pushed.version)  # who decodes with it shall not be what evicts it
            with passing(server.inference, arguments.per_second) as pipe:
                others = Others()
                row = await measure(client, pipe, server.metrics, arguments.rounds, arguments.streams)
                return {**row, "others_cores": others.refuse()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--per-second", type=float, default=10.0, help="adapters that are loaded meanwhile")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    arguments = parser.parse_args()
    wait_until_quiet()
    with tempfile.TemporaryDirectory() as name:
        row = asyncio.run(run(arguments, Path(name)))
    for name, value in row.items():
        print(f"{name:22} {value if isinstance(value, dict) else round(value, 3)}", file=sys.stderr)
    record("churn", {"streams": arguments.streams, "per_second": arguments.per_second, **row})
    if arguments.json:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
