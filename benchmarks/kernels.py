"""The operators of `chorus.kernels`, one by one, beside what else one could do and beside what the machine can at best.

    python benchmarks/kernels.py [--device cpu] [--op low_rank] [--json] [--peer MODULE:FUNCTION]

Prints the ceilings first, then a table: time, the floor (bytes that have to move, at the measured read bandwidth),
floor over time, and each contestant's time over ours. Contestants take turns on the same inputs, which rotate past the
caches. With --json one JSON line comes last; a row goes to results/kernels.jsonl. On CUDA sweeps over Llama-3-8B's
shapes come first (`kernel_sweep.py`, `attention_sweep.py`), a row in that file for each case.

A peer is a function (op, inputs) -> a callable to time, or None where it has nothing for that operator; the inputs are
the fields of `LowRankCase` or `AttentionCase`. It may be given more than once.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch

from attention_sweep import LLAMA_8B, attention_cases, attention_sweep
from common import copy_bandwidth, matmul_rate, or_toy, peer_dtype, read_bandwidth, record, wait_until_quiet
from kernel_cases import (
    BLOCK,
    RANK,
    ROWS,
    Work,
    attention_case,
    attention_contestants,
    low_rank_case,
    low_rank_contestants,
    step_groups,
)
from kernel_sweep import Peer, llama_cases, sweep
from kernel_timing import Ceilings, empty_launch

CONTEXTS = (128, 512, 1024)
ROUNDS = or_toy(15, 1)


def take_turns(contestants: dict[str, Work], device: str) -> dict[str, float]:
    """Median seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(ROUNDS + 2):
        for name, work in contestants.items():
            if device == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}


def run(
    op: str, case: Any, contestants: dict[str, Work], peers: dict[str, Peer], ceiling: float, device: str
) -> dict[str, Any]:
    """Times one case and prints its rows; seconds by contestant, GB/s and floor / time of ours."""
    for name, peer in peers.items():
        if (work := peer(op, case)) is not None:
            contestants[name] = work
    seconds = take_turns(contestants, device)
    floor = case.bytes / ceiling
    ours = seconds["chorus"]
    label = op if op == "low_rank" else f"{op} {case.context}"
    for name, taken in seconds.items():
        about_ours = f"floor {floor * 1e3:7.3f} ms, floor/time {floor / taken:.2f}" if name == "chorus" else ""
        print(f"{label:22} {name:22} {taken * 1e3:9.3f} ms   x{taken / ours:5.2f}   {about_ours}", file=sys.stderr)
    return {"seconds": seconds, "gb_s": case.bytes / ours / 1e9, "floor_over_time": floor / ours}


def measure(ops: list[str], peers: dict[str, Peer], device: str) -> dict[str, Any]:
    read, copy = read_bandwidth(device), copy_bandwidth(device)
    rate = matmul_rate(peer_dtype(device), device)
    print(
        f"read {read / 1e9:.1f} GB/s, copy {copy / 1e9:.1f} GB/s, matmul {rate / 1e12:.2f} TFLOP/s",
        file=sys.stderr,
    )
    row: dict[str, Any] = {
        "device": device,
        "peer_dtype": str(peer_dtype(device)).removeprefix("torch."),
        "page": BLOCK,
        "read_gb_s": read / 1e9,
        "copy_gb_s": copy / 1e9,
        "matmul_tflop_s": rate / 1e12,
    }
    if device == "cuda":
        ceilings = Ceilings(read, rate, empty_launch())
        row["empty_launch_us"] = ceilings.launch * 1e6
        print(f"an empty node of a graph {row['empty_launch_us']:.2f} us", file=sys.stderr)
        run_id = int(time.time())
        if "low_rank" in ops:
            record_sweep(run_id, sweep(llama_cases(), ceilings, peers, device))
        if "paged_attention" in ops:
            record_sweep(run_id, attention_sweep(attention_cases(), LLAMA_8B, ceilings, peers, device))
    if device == "cpu":
        row["threads"] = torch.get_num_threads()
    if "low_rank" in ops:
        deltas = low_rank_case(device, step_groups(), ROWS, [RANK] * ROWS)
        found = run("low_rank", deltas, low_rank_contestants(deltas), peers, read, device)
        row["low_rank"] = found
        row["low_rank_16x16_over_base_linears"] = found["seconds"]["chorus"] / found["seconds"]["base linears"]
    if "paged_attention" in ops:
        row["paged_attention"] = {}
        for context in CONTEXTS:
            decode = attention_case(context, device)
            contestants = attention_contestants(decode)
            row["paged_attention"][context] = run("paged_attention", decode, contestants, peers, read, device)
        row["paged_attention_speedup_over_folded_sdpa"] = {
            context: found["seconds"]["per-row folded SDPA"] / found["seconds"]["chorus"]
            for context, found in row["paged_attention"].items()
        }
    return row


def record_sweep(run_id: int, cases: Iterable[dict[str, Any]]) -> None:
    """A row for each of Llama-3-8B's cases, and a printed line: ours beside its floor, the others in times of ours."""
    for found in cases:
        ours = found["seconds"]["chorus"]
        others = "  ".join(
            f"{name} x{taken / ours:.2f}" for name, taken in found["seconds"].items() if name != "chorus"
        )
        floor = f"floor {found['floor'] * 1e6:8.1f} us, floor/time {found['floor_over_time']:.2f}"
        print(f"{found['case']:42} {ours * 1e6:9.1f} us  {floor}  {others}", file=sys.stderr)
        record("kernels", {"device": "cuda", "run": run_id, **found})


def load_peer(name: str) -> Peer:
    module, _, function = name.partition(":")
    peer: Peer = getattr(import_module(module), function)
    return peer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--op", choices=("low_rank", "paged_attention"), action="append", help="only this one")
    parser.add_argument("--peer", metavar="MODULE:FUNCTION", action="append", default=[])
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch finds no CUDA device here")
    wait_until_quiet()
    peers = {name: load_peer(name) for name in arguments.peer}
    with torch.inference_mode():
        row = measure(arguments.op or ["low_rank", "paged_attention"], peers, arguments.device)
    record("kernels", row)
    if arguments.json:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
