"""How long a server takes to start, and with what: from the process' start until its health is SERVING.

    python benchmarks/startup.py [--rounds 3] [--json]

The 144M Llama shape in bf16, its file in the page cache; beside it how long the file takes to read, in turns. In a new
state folder the weights are hashed, in the next start their digest is known. Stages are the log's: the engine's
packages imported, weights read (and hashed beside that), packed for oneDNN; the rest is the server's until it is ready.
Prints a table, and with --json one JSON line last; a row goes to results/startup.jsonl.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common import Others, or_toy, record, wait_until_quiet
from loads.live_server import READY
from peers.work import base_folder, save_weights

# What the log says at the end of each stage.
STAGES = {"imports": "packages are imported", "weights": "read and hashed", "packing": "are packed"}
PORTS = ("--port", "0", "--admin-port", "0", "--metrics-port", "0")


def start(model: Path, state_dir: Path) -> dict[str, float]:
    """Seconds of each stage of one start, and of all of it."""
    entry = [sys.executable, "-c", "from chorus.cli.main import main; main()", "serve"]
    logging = ("--log-level", "debug", "--log-format", "json")
    command = [*entry, "--model", str(model), "--state-dir", str(state_dir), *PORTS, *logging]
    log_file = state_dir.with_suffix(".log")
    with log_file.open("w") as log:
        began = time.time()
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert server.stdout is not None
            ready = next((found for line in server.stdout if (found := READY.match(line))), None)
            if ready is None:
                raise RuntimeError(f"the server did not start: {log_file.read_text()}")
            check_serving(ready[1])
            ended = time.time()
        finally:
            server.terminate()
            server.wait()
    at = {"start": began, **stages(log_file.read_text()), "rest": ended}
    spent = {after: at[after] - at[before] for before, after in itertools.pairwise(at)}
    return {**spent, "all": ended - began}


def stages(log: str) -> dict[str, float]:
    """When each stage ended, seconds since 1970."""
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    return {
        stage: next(datetime.fromisoformat(line["time"]).timestamp() for line in lines if words in line["message"])
        for stage, words in STAGES.items()
    }


def check_serving(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        if answer.status != health_pb2.HealthCheckResponse.SERVING:
            raise RuntimeError("ready, and not serving")


def read(model: Path) -> float:
    """Seconds to read the weight files, and nothing else."""
    began = time.perf_counter()
    for file in model.glob("*.safetensors"):
        with file.open("rb", buffering=0) as opened:
            while opened.read(1 << 22):
                pass
    return time.perf_counter() - began


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    save_weights(folder)
    model = base_folder(folder)
    got: dict[str, list[dict[str, float]]] = {"first": [], "again": []}
    reads = []
    start(model, folder / "warm-up")
    for i in range(rounds):
        reads.append(read(model))
        for starts in got.values():
            starts.append(start(model, folder / f"state-{i}"))
    row: dict[str, Any] = {"read_s": statistics.median(reads)}
    for name, starts in got.items():
        row[f"{name}_s"] = {stage: statistics.median(it[stage] for it in starts) for stage in starts[0]}
    row["first_over_read_s"] = row["first_s"]["all"] - row["read_s"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=or_toy(3, 1))
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    arguments = parser.parse_args()
    wait_until_quiet()
    with tempfile.TemporaryDirectory() as name:
        others = Others()
        row = measure(Path(name), arguments.rounds)
        row["others_cores"] = others.cores()
    print(f"{'':8}" + "".join(f"{stage:>9}" for stage in row["first_s"]), file=sys.stderr)
    for name in ("first", "again"):
        print(f"{name:8}" + "".join(f"{seconds:9.2f}" for seconds in row[f"{name}_s"].values()), file=sys.stderr)
    print(f"the file alone is read in {row['read_s']:.2f} s", file=sys.stderr)
    record("startup", row)
    if arguments.json:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
