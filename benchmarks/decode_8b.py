"""Steps of an engine of Llama-3-8B's shape with random weights, for GPUs: decodes over 512 tokens, and a long prompt.

    python benchmarks/decode_8b.py --device cuda [--json] [--adapters 64]

Prints the floor of each step beside it, the bytes that it must read over the measured copy bandwidth, and what the same
steps take one after the other, and without CUDA graphs. A row goes to results/decode_8b.jsonl. What a first run is
expected to show is in docs/kernels-predictions.md.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from chorus import allocator
from chorus.config import ServerConfig
from chorus.engine import messages as m
from chorus.engine.engine import Engine
from chorus.models.base import Base
from common import SHAPE_144M, copy_bandwidth, matmul_rate, or_toy, peer_dtype, record, wait_until_quiet
from loads.alone import alone, load_adapters
from loads.decodes import decode_ms, prefill_ms
from loads.distinct import shapes, write_adapter

SHAPE_8B: dict[str, Any] = or_toy(
    {
        **SHAPE_144M,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
    SHAPE_144M,
)
CONTEXT, RANK, PROMPT = or_toy(512, 40), 16, or_toy(2048, 64)
ROWS = or_toy((1, 16, 64), (1, 2))
BYTES = 2


def weight_bytes() -> int:
    """What every step reads of the base: its linears and lm_head."""
    layer = sum(k * n for k, n in shapes(SHAPE_8B).values())
    return BYTES * int(SHAPE_8B["num_hidden_layers"] * layer + SHAPE_8B["hidden_size"] * SHAPE_8B["vocab_size"])


def row_bytes() -> int:
    """Keys and values of a row's context."""
    heads = SHAPE_8B["num_key_value_heads"] * SHAPE_8B["head_dim"]
    return int(2 * BYTES * SHAPE_8B["num_hidden_layers"] * heads * CONTEXT)


def adapter_bytes() -> int:
    """A and B of an adapter on all linears."""
    return BYTES * RANK * int(SHAPE_8B["num_hidden_layers"]) * sum(k + n for k, n in shapes(SHAPE_8B).values())


def engine_of_8b(folder: Path, device: Literal["cpu", "cuda"], adapters: int, **options: Any) -> Any:
    """An engine, its base and its memory, with room for so many adapters; `options` are the configuration's."""
    (folder / "config.json").write_text(json.dumps(SHAPE_8B))
    config = ServerConfig(
        model=str(folder),
        device=device,
        load_format="dummy",
        kv_cache_mb=2 * (max(ROWS) * row_bytes()) // 2**20 + 64,
        adapter_memory_mb=(adapters + 8) * adapter_bytes() // 2**20 + 64,
        max_rows=max(ROWS),
        max_step_tokens=PROMPT,
        **options,
    )
    return alone(config)


def steps(engine: Engine, refs: Sequence[m.AdapterRef]) -> dict[str, float]:
    """Milliseconds of decode steps by what decodes: rows of the base, rows of as many adapters."""
    nobody: list[m.AdapterRef | None] = [None]
    times = {f"base_{rows}": decode_ms(engine, nobody * rows, CONTEXT) for rows in ROWS}
    for rows in (rows for rows in ROWS if 1 < rows <= len(refs)):
        times[f"adapters_{rows}"] = decode_ms(engine, refs[:rows], CONTEXT)
    return times


def floors(bandwidth: float) -> dict[str, float]:
    """Milliseconds that the bytes of each take."""
    base = {f"base_{rows}": weight_bytes() + rows * row_bytes() for rows in ROWS}
    adapted = {f"adapters_{rows}": base[f"base_{rows}"] + rows * adapter_bytes() for rows in ROWS}
    return {name: count / bandwidth * 1e3 for name, count in (base | adapted).items()}


def measure(device: Literal["cpu", "cuda"], adapters: int) -> dict[str, Any]:
    bandwidth, rate = copy_bandwidth(device), matmul_rate(peer_dtype(device), device)
    row: dict[str, Any] = {"device": device, "copy_gb_s": bandwidth / 1e9, "matmul_tflop_s": rate / 1e12}
    with tempfile.TemporaryDirectory() as name:
        folders = [write_adapter(SHAPE_8B, Path(name) / str(i), i, [RANK]) for i in range(adapters)]
        ways: dict[str, dict[str, Any]] = {
            "steps_ms": {},
            "steps_without_overlap_ms": {"overlap": "off"},
            "steps_without_graphs_ms": {"graphs": "off"},
        }
        for title, options in ways.items():
            engine, base, _ = engine_of_8b(Path(name), device, adapters, **options)
            row[title] = steps(engine, _loaded(engine, base, folders))
            row["prefill_ms"] = prefill_ms(engine, PROMPT)
            engine.close()
            del engine, base
    row["floors_ms"] = {case: floor for case, floor in floors(bandwidth).items() if case in row["steps_ms"]}
    row["efficiency"] = {case: floor / row["steps_ms"][case] for case, floor in row["floors_ms"].items()}
    row["prefill_of_matmul_rate"] = PROMPT * weight_bytes() / (row["prefill_ms"] / 1e3) / rate
    return row


def _loaded(engine: Engine, base: Base, folders: Sequence[Path]) -> list[m.AdapterRef]:
    return load_adapters(engine, base, folders)[0]


def show(row: dict[str, Any]) -> None:
    print(f"{'step':14} {'ms':>8} {'floor':>8} {'share':>6} {'no overlap':>10} {'no graphs':>10}", file=sys.stderr)
    for case, ms in row["steps_ms"].items():
        floor = row["floors_ms"][case]
        without = [row[f"steps_without_{what}_ms"][case] for what in ("overlap", "graphs")]
        print(
            f"{case:14} {ms:8.2f} {floor:8.2f} {floor / ms:6.2f} {without[0]:10.2f} {without[1]:10.2f}", file=sys.stderr
        )
    share = row["prefill_of_matmul_rate"]
    print(f"prompt of {PROMPT}: {row['prefill_ms']:.1f} ms, {share:.2f} of the matmul rate", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--adapters", type=int, default=or_toy(64, 2), help="how many, distinct, of rank 16")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    arguments = parser.parse_args()
    wait_until_quiet()
    row = measure(arguments.device, arguments.adapters)
    show(row)
    record("decode_8b", row)
    if arguments.json:
        print(json.dumps(row))


if __name__ == "__main__":
    allocator.start_again()  # as a server's engine
    main()
