"""What lies between a layer's linears, operator by operator, beside transformers' own modules on the same inputs.

    python benchmarks/pointwise.py [--device cpu] [--json]

Prints the ceiling first, then per operator its time, the floor (bytes that have to move, at the measured copy
bandwidth), and each contestant's time over ours. Contestants take turns; a turn is CALLS calls on the same inputs,
which stay in the caches, as a layer's do; on CUDA it is one replay of a graph, at a decode's rows and at a chunk's, or
launches would hide what they launch. With --json one JSON line comes last; a row goes to results/pointwise.jsonl.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from chorus.kernels import (
    HeadPlan,
    HeadPool,
    HeadSegment,
    Norm,
    RopePlan,
    RowPlan,
    SlotSegment,
    gelu_tanh_mul,
    head,
    qk_norm_rope_store,
    residual_norm,
    row_scale,
    silu_mul,
    store_kv,
)
from common import Others, copy_bandwidth, or_toy, record, wait_until_quiet
from kernel_timing import Work, captured, event_seconds

ROUNDS, CALLS = or_toy(25, 1), or_toy(60, 1)
LOOPED = 64  # rows; above, a loop over them is launches and nothing else
EPS = 1e-6


class Shape(NamedTuple):
    rows: int
    hidden: int
    wide: int
    heads: int
    kv_heads: int
    dim: int


# The 144M shape of `common`, and Llama-3-8B.
SHAPES = {
    "cpu": [Shape(16, 1024, 2816, 16, 4, 64)],
    "cuda": [Shape(64, 4096, 14336, 32, 8, 128), Shape(2048, 4096, 14336, 32, 8, 128)],
}


@dataclass(frozen=True, slots=True)
class Case:
    """An operator's contestants, and the bytes that any of them has to move."""

    name: str
    bytes: int
    contestants: dict[str, Work]


def cases(device: str) -> Iterator[Case]:
    """With the rows in their names where there is more than one number of them."""
    for shape in SHAPES[device]:
        for case in cases_of(shape, device):
            yield replace(case, name=f"{case.name}, {shape.rows} rows") if len(SHAPES[device]) > 1 else case
    for heads in HEADS[device]:
        yield head_case(heads, device)


def cases_of(shape: Shape, device: str) -> Iterator[Case]:
    rows, hidden, wide = shape[:3]

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).bfloat16()

    x, residual, vectors = draw(rows, hidden), draw(rows, hidden), draw(rows, hidden)
    plan = RowPlan([SlotSegment(i, i + 1, i) for i in range(rows)], rows, torch.device(device))
    yield from norm_cases(x, residual, vectors, plan)
    gate, up = draw(rows, 2 * wide).chunk(2, dim=-1)
    eager: tuple[Work, Work] = (lambda: F.silu(gate) * up, lambda: F.gelu(gate, approximate="tanh") * up)
    yield Case("silu_mul", 3 * gate.numel() * 2, {"chorus": lambda: silu_mul(gate, up), "transformers": eager[0]})
    yield Case(
        "gelu_tanh_mul", 3 * gate.numel() * 2, {"chorus": lambda: gelu_tanh_mul(gate, up), "transformers": eager[1]}
    )
    yield from rope_cases(shape, device)
    scaled, ones = draw(rows, hidden), torch.ones(rows, hidden, dtype=torch.bfloat16, device=device)

    def loop() -> None:
        for i in range(rows):
            scaled[i].mul_(ones[i])

    contestants: dict[str, Work] = {"chorus": lambda: row_scale(scaled, ones, plan)}
    if rows <= LOOPED:
        contestants["loop over adapters"] = loop
    yield Case("row_scale", 3 * x.nbytes, contestants)


def norm_cases(x: Tensor, residual: Tensor, vectors: Tensor, plan: RowPlan) -> Iterator[Case]:
    """Contestants norm a sum; ours is in place, transformers' a new tensor."""
    hidden = x.shape[1]
    llama, gemma, layer = (
        LlamaRMSNorm(hidden, EPS).to(x),
        Gemma3RMSNorm(hidden, EPS).to(x),
        nn.LayerNorm(hidden, EPS).to(x),
    )
    small = x / 1e6

    def eager(module: nn.Module) -> object:
        return module(residual + small)

    rms = Norm("rms", llama.weight.detach(), EPS)
    own = Norm("rms", llama.weight.detach(), EPS, None, vectors)
    plus_one = Norm("rms_plus_one", gemma.weight.detach(), EPS)
    centred = Norm("layer", layer.weight.detach(), EPS, layer.bias.detach())
    for name, norm, module in (("rms", rms, llama), ("rms_plus_one", plus_one, gemma), ("layer", centred, layer)):
        ours: dict[str, Work] = {"chorus": partial(residual_norm, residual, small, norm)}
        yield Case(f"residual_norm {name}", 4 * x.nbytes, ours | {"transformers": partial(eager, module)})
    own_vectors: dict[str, Work] = {"chorus": lambda: residual_norm(residual, small, own, plan)}
    yield Case("residual_norm rms, each row its own", 5 * x.nbytes, own_vectors)


def rope_cases(shape: Shape, device: str) -> Iterator[Case]:
    rows, _, _, heads, kv_heads, dim = shape
    qkv = torch.randn(rows, heads + 2 * kv_heads, dim, device=device).bfloat16()
    angle = torch.rand(rows, dim // 2, device=device)
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    both = [torch.cat((t, t), dim=-1)[None] for t in (cos, sin)]
    k_cache, v_cache = (qkv.new_zeros(200, kv_heads, 32, dim) for _ in range(2))
    slots = torch.randperm(6400, device=device)[:rows]
    plan = RopePlan(cos, sin, slots)
    modules = [LlamaRMSNorm(dim, EPS).to(qkv) for _ in range(2)]
    norms = dict(zip(("q_norm", "k_norm"), (Norm("rms", m.weight.detach(), EPS) for m in modules), strict=True))

    def eager(normed: bool) -> Tensor:
        query, key, value = (t.transpose(0, 1)[None] for t in qkv.split((heads, kv_heads, kv_heads), dim=1))
        if normed:
            query, key = modules[0](query), modules[1](key)
        query, key = apply_rotary_pos_emb(query, key, *both)
        store_kv(key[0].transpose(0, 1), value[0].transpose(0, 1), k_cache, v_cache, slots)
        turned: Tensor = query[0].transpose(0, 1).contiguous()
        return turned

    for name, given in (("rope_store", {}), ("qk_norm_rope_store", norms)):
        ours = partial(qk_norm_rope_store, qkv, k_cache, v_cache, plan, **given)
        yield Case(name, 2 * qkv.nbytes, {"chorus": ours, "transformers and store_kv": partial(eager, bool(given))})


class Heads(NamedTuple):
    """A head of `labels` labels for each adapter, over `rows` states of 768 each; with a dense layer, or not."""

    name: str
    adapters: int
    rows: int
    labels: int
    dense: bool


HEADS = {
    "cpu": [Heads("head", 16, 1, 5, True)],
    "cuda": [Heads("head, 64 of two layers", 64, 1, 8, True), Heads("head, 8 over 2048 tokens", 8, 256, 16, False)],
}


def head_case(heads: Heads, device: str) -> Case:
    count, each, labels, width = heads.adapters, heads.rows, heads.labels, 768

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).bfloat16()

    x, weight, bias = draw(count * each, width), draw(count * labels, width), draw(count * labels)
    dense, dense_bias = (draw(count, width, width), draw(count, width)) if heads.dense else (None, None)
    pool = HeadPool(weight, bias, dense, dense_bias)
    segments = [
        HeadSegment(i * each, (i + 1) * each, i * labels, labels, i if heads.dense else None) for i in range(count)
    ]
    plan = HeadPlan(segments, len(x), torch.device(device))

    def loop() -> None:
        for i, s in enumerate(segments):
            state = x[s.start : s.end]
            if dense is not None and dense_bias is not None:
                state = torch.tanh(F.linear(state, dense[i], dense_bias[i]))
            own = slice(s.first, s.first + labels)
            F.linear(state, weight[own], bias[own])

    moved = weight.nbytes + x.nbytes + 2 * len(x) * labels + (0 if dense is None else dense.nbytes)
    return Case(heads.name, moved, {"chorus": lambda: head(x, pool, plan), "loop over heads": loop})


def take_turns(contestants: dict[str, Work], device: str) -> dict[str, float]:
    """Median microseconds of a call of each."""
    if device == "cuda":
        return {name: event_seconds(captured(repeated(work))) / CALLS * 1e6 for name, work in contestants.items()}
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(ROUNDS + 2):
        for name, work in contestants.items():
            began = time.perf_counter()
            for _ in range(CALLS):
                work()
            if turn >= 2:
                taken[name].append((time.perf_counter() - began) / CALLS * 1e6)
    return {name: statistics.median(times) for name, times in taken.items()}


def repeated(work: Work) -> Work:
    def calls() -> None:
        for _ in range(CALLS):
            work()

    return calls


def measure(device: str) -> dict[str, Any]:
    copy = copy_bandwidth(device)
    print(f"copy {copy / 1e9:.1f} GB/s", file=sys.stderr)
    row: dict[str, Any] = {"device": device, "threads": torch.get_num_threads(), "copy_gb_s": copy / 1e9, "us": {}}
    for case in cases(device):
        taken, floor = take_turns(case.contestants, device), case.bytes / copy * 1e6
        ours = taken["chorus"]
        row["us"][case.name] = {**taken, "floor": floor}
        for name, us in taken.items():
            print(f"{case.name:36} {name:26} {us:8.1f} us   x{us / ours:5.2f}   floor {floor:6.2f} us", file=sys.stderr)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(SHAPES), default="cpu")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    arguments = parser.parse_args()
    wait_until_quiet()
    others = Others()
    with torch.inference_mode():
        row = measure(arguments.device)
    row["others_busy_cores"] = others.refuse()
    record("pointwise", row)
    if arguments.json:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
