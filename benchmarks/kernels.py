"""The operators of `chorus.kernels`, one by one, beside what else one could do and beside what the machine can at best.

    python benchmarks/kernels.py [--device cpu] [--op low_rank] [--json] [--peer MODULE:FUNCTION]

Prints the ceilings first, then a table: time, the floor (bytes that have to move, at the measured read bandwidth),
floor over time, and each contestant's time over ours. Contestants take turns on the same inputs, which rotate past the
caches. With --json one JSON line comes last; a row goes to results/kernels.jsonl.

A peer is a function (op, inputs) -> a callable to time, or None where it has nothing for that operator; the inputs are
the fields of `LowRankCase` or `AttentionCase`. It may be given more than once.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chorus.kernels import (
    AttentionPlan,
    AttentionRow,
    LowRankPlan,
    LowRankSegment,
    RankPool,
    low_rank_group,
    paged_attention,
)
from common import SHAPE_144M, copy_bandwidth, matmul_rate, read_bandwidth, record, wait_until_quiet

ROWS, RANK = 16, 16
LAYERS = SHAPE_144M["num_hidden_layers"]
CONTEXTS = (128, 512, 1024)
HEADS, KV_HEADS, DIM, BLOCK = 16, 4, 64, 32
ROUNDS = 15

Work = Callable[[], object]
Peer = Callable[[str, Any], Work | None]


@dataclass(frozen=True)
class LowRankCase:
    """One step's deltas: for each layer and linear x [16, K], base weight [N, K], pool a [256, K], b [256, N].

    q, k and v have the same x, and so have gate and up.
    """

    x: list[Tensor]
    weight: list[Tensor]
    pool: list[RankPool]
    y: list[Tensor]
    segments: list[LowRankSegment]

    @property
    def bytes(self) -> int:
        """Adapters' weights once, x read, y read and written."""
        pools = sum(pool.a.nbytes + pool.b.nbytes for pool in self.pool)
        inputs = {id(x): x.nbytes for x in self.x}
        return pools + sum(inputs.values()) + sum(2 * y.nbytes for y in self.y)


@dataclass(frozen=True)
class AttentionCase:
    """Decode of 16 rows: query [16, H, D], caches [blocks, H_kv, B, D] of each layer, pages scattered."""

    context: int
    query: Tensor
    k_cache: list[Tensor]
    v_cache: list[Tensor]
    rows: list[AttentionRow]

    @property
    def bytes(self) -> int:
        """Every key and value once."""
        return 2 * ROWS * self.context * KV_HEADS * DIM * self.query.element_size() * len(self.k_cache)


def linears() -> Iterator[tuple[int, int]]:
    """(K, N) of a layer's seven linears."""
    hidden, ffn = SHAPE_144M["hidden_size"], SHAPE_144M["intermediate_size"]
    kv = KV_HEADS * DIM
    yield from (
        (hidden, hidden),
        (hidden, kv),
        (hidden, kv),
        (hidden, hidden),
        (hidden, ffn),
        (hidden, ffn),
        (ffn, hidden),
    )


def groups() -> list[tuple[int, int]]:
    """The sites that read the same x, from the first to before the last: q, k, v; o; gate, up; down."""
    return [(7 * layer + a, 7 * layer + b) for layer in range(LAYERS) for a, b in ((0, 3), (3, 4), (4, 6), (6, 7))]


def low_rank_case(device: str) -> LowRankCase:
    torch.manual_seed(0)
    rows = ROWS * RANK

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).bfloat16()

    sites = [shape for _ in range(LAYERS) for shape in linears()]
    scale = torch.full((rows,), 0.5, device=device)
    inputs = [[random(ROWS, sites[first][0])] * (last - first) for first, last in groups()]
    return LowRankCase(
        x=[x for same in inputs for x in same],
        weight=[random(n, k) for k, n in sites],
        pool=[RankPool(random(rows, k), random(rows, n), scale) for k, n in sites],
        y=[random(ROWS, n) for _, n in sites],
        segments=[LowRankSegment(i, i + 1, tuple(range(i * RANK, (i + 1) * RANK))) for i in range(ROWS)],
    )


def low_rank_contestants(case: LowRankCase) -> dict[str, Work]:
    plan = LowRankPlan(case.segments, case.x[0].device)

    sites = [(case.y[a:b], case.x[a], case.pool[a:b], [plan] * (b - a)) for a, b in groups()]

    def ours() -> None:
        for ys, x, pools, plans in sites:
            low_rank_group(ys, x, pools, plans)

    def base() -> None:
        for x, weight in zip(case.x, case.weight, strict=True):
            F.linear(x, weight)

    def loop() -> None:
        for y, x, pool in zip(case.y, case.x, case.pool, strict=True):
            for s in case.segments:
                part = slice(s.pool_rows[0], s.pool_rows[-1] + 1)
                y[s.start : s.end] += (x[s.start : s.end] @ pool.a[part].T) @ pool.b[part] * 0.5

    def bmm() -> None:
        for y, x, pool in zip(case.y, case.x, case.pool, strict=True):
            a, b = pool.a.view(ROWS, RANK, -1), pool.b.view(ROWS, RANK, -1)
            y.add_(torch.bmm(torch.bmm(x[:, None], a.transpose(1, 2)), b)[:, 0], alpha=0.5)

    return {"chorus": ours, "base linears": base, "loop over adapters": loop, "padded bmm": bmm}


def attention_case(context: int, device: str) -> AttentionCase:
    torch.manual_seed(context)
    each = -(-context // BLOCK)
    blocks = torch.randperm(ROWS * each).view(ROWS, each).tolist()

    def cache() -> Tensor:
        return torch.randn(ROWS * each, KV_HEADS, BLOCK, DIM, device=device).bfloat16()

    return AttentionCase(
        context=context,
        query=torch.randn(ROWS, HEADS, DIM, device=device).bfloat16(),
        k_cache=[cache() for _ in range(LAYERS)],
        v_cache=[cache() for _ in range(LAYERS)],
        rows=[AttentionRow(i, i + 1, context, blocks[i]) for i in range(ROWS)],
    )


def attention_contestants(case: AttentionCase) -> dict[str, Work]:
    device = case.query.device
    plan = AttentionPlan(case.rows, BLOCK, device)
    tables = [torch.tensor(row.blocks, device=device) for row in case.rows]
    # Each contestant has the layout that suits it best: position-major pages are gathered as rows of a sequence.
    layers = list(zip(case.k_cache, case.v_cache, strict=True))
    by_position = [tuple(cache.transpose(1, 2).contiguous() for cache in layer) for layer in layers]

    def ours() -> None:
        for k_cache, v_cache in layers:
            paged_attention(case.query, k_cache, v_cache, plan, scale=DIM**-0.5)

    def folded() -> None:
        for caches in by_position:
            for i, table in enumerate(tables):
                key, value = (
                    cache.index_select(0, table).view(1, -1, KV_HEADS, DIM)[:, : case.context].transpose(1, 2)
                    for cache in caches
                )
                query = case.query[i].view(1, KV_HEADS, HEADS // KV_HEADS, DIM)
                F.scaled_dot_product_attention(query, key, value)

    return {"chorus": ours, "per-row folded SDPA": folded}


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
    rate = matmul_rate(torch.bfloat16, device)
    print(
        f"read {read / 1e9:.1f} GB/s, copy {copy / 1e9:.1f} GB/s, bf16 matmul {rate / 1e12:.2f} TFLOP/s",
        file=sys.stderr,
    )
    row: dict[str, Any] = {
        "device": device,
        "read_gb_s": read / 1e9,
        "copy_gb_s": copy / 1e9,
        "matmul_tflop_s": rate / 1e12,
    }
    if device == "cpu":
        row["threads"] = torch.get_num_threads()
    if "low_rank" in ops:
        deltas = low_rank_case(device)
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
    wait_until_quiet()
    peers = {name: load_peer(name) for name in arguments.peer}
    with torch.inference_mode():
        row = measure(arguments.op or ["low_rank", "paged_attention"], peers, arguments.device)
    record("kernels", row)
    if arguments.json:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
