"""The engine's tokens/s on CPU beside transformers' `generate()` and peft's mixed batch, interleaved in one run.

    python benchmarks/engine.py [--json] [--rounds 3] [--device cpu]

16 requests, 64 tokens in, 64 out, greedy, bf16, a 144M Llama shape; adapters of rank 16 on all seven linears. Each
contestant is a process of its own with the same weights, and they take turns; ratios are of medians. Prints the
ceilings first, a table, and with --json one JSON line last; a row goes to results/engine.jsonl.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from common import SHAPE_144M, copy_bandwidth, matmul_rate, record, wait_until_quiet

REQUESTS, TOKENS_IN, TOKENS_OUT, RANK = 16, 64, 64, 16
KV_MB, ADAPTER_MB = 64, 160
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTED = {"base": 0, "one": 1, "mixed8": 8, "mixed16": 16}


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(42)
    return torch.randint(0, SHAPE_144M["vocab_size"], (REQUESTS, TOKENS_IN), generator=generator).tolist()


def chorus_contestant(folder: Path, device: str) -> tuple[Callable[[int], float], Callable[[], dict[str, float]]]:
    """Our engine, stepped in this process: a function (adapters) -> tokens/s, and one that tells its memory."""
    from chorus.adapters import artifact as artifacts
    from chorus.adapters.digest import version_digest
    from chorus.config import ServerConfig
    from chorus.engine import messages as m
    from chorus.engine.engine import Engine
    from chorus.engine.memory import plan_memory
    from chorus.models.base import load_base

    config = ServerConfig(kv_cache_mb=KV_MB, adapter_memory_mb=ADAPTER_MB)
    base = load_base(str(folder), device=device, dtype="bfloat16", load_format="dummy")
    memory = plan_memory(base, config)
    engine = Engine(base, memory, max_rank=64, max_rows=REQUESTS, max_step_tokens=512, max_queue=64)
    folders = [folder / f"adapter-{i}" for i in range(16)]
    refs = [m.AdapterRef(version_digest(artifacts.read(f), base.facts.digest), str(f)) for f in folders]
    loaded: set[str] = set()
    engine.step([m.Pin(ref) for ref in refs])
    while len(loaded) < len(refs):
        loaded |= {e.digest for e in engine.step([]).events if isinstance(e, m.Loaded)}
        time.sleep(0.01)

    def run(adapters: int) -> float:
        sampling = m.Sampling(TOKENS_OUT, temperature=0.0, ignore_eos=True)
        submits = [
            m.Submit(i, tuple(prompt), sampling, refs[i % adapters] if adapters else None)
            for i, prompt in enumerate(prompts())
        ]
        tokens = 0
        began = time.perf_counter()
        events = engine.step(submits).events
        while True:
            tokens += sum(len(e.token_ids) for e in events if isinstance(e, m.Tokens))
            if tokens == REQUESTS * TOKENS_OUT:
                return tokens / (time.perf_counter() - began)
            events = engine.step([]).events

    def memory_mb() -> dict[str, float]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        weights = base.facts.parameter_count * base.dtype.itemsize / 2**20
        return {"peak_rss_mb": peak, "weights_mb": weights, "rss_over_budgets_mb": peak - weights - KV_MB - ADAPTER_MB}

    return run, memory_mb


def transformers_contestant(folder: Path, device: str) -> tuple[Callable[[int], float], Callable[[], dict[str, float]]]:
    """transformers' generate() for the base, peft's `adapter_names` batch for adapters. Saves the adapters first."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16).eval().to(device)
    wrapped: PeftModel | None = None
    for i in range(16):
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LINEARS, init_lora_weights=False)
        if wrapped is None:
            wrapped = get_peft_model(plain, config, adapter_name=f"a{i}", autocast_adapter_dtype=False)
        else:
            wrapped.add_adapter(f"a{i}", config, autocast_adapter_dtype=False)
    assert wrapped is not None
    wrapped.eval().to(device)
    for i in range(16):
        wrapped.save_pretrained(str(folder / f"a{i}-saved"), selected_adapters=[f"a{i}"])
        (folder / f"a{i}-saved" / f"a{i}").rename(folder / f"adapter-{i}")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16).eval().to(device)
    ids = torch.tensor(prompts(), device=device)
    options = {"max_new_tokens": TOKENS_OUT, "min_new_tokens": TOKENS_OUT, "do_sample": False, "pad_token_id": 0}

    @torch.inference_mode()
    def run(adapters: int) -> float:
        began = time.perf_counter()
        if adapters:
            names = [f"a{i % adapters}" for i in range(REQUESTS)]
            out = wrapped.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=names, **options)
        else:
            out = base.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        assert out.shape[1] == TOKENS_IN + TOKENS_OUT
        return REQUESTS * TOKENS_OUT / (time.perf_counter() - began)

    return run, dict


def serve(make: Callable[[Path, str], Any], folder: Path, device: str, pipe: Connection) -> None:
    """A contestant's process: answers each number of adapters with its tokens/s, and None with its memory."""
    run, memory = make(folder, device)
    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        pipe.send(run(asked))
    pipe.send(memory())


def start(make: Callable[[Path, str], Any], folder: Path, device: str) -> Connection:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=serve, args=(make, folder, device, theirs), daemon=True).start()
    theirs.close()
    assert ours.recv() == "ready"
    return ours


def measure(rounds: int, device: str) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, float]]:
    """Tokens/s of each workload and round, ours and theirs, in turns; the first round is a warm-up."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(SHAPE_144M))
        theirs_pipe = start(transformers_contestant, folder, device)  # first: it saves the adapters
        our_pipe = start(chorus_contestant, folder, device)
        ours: dict[str, list[float]] = {w: [] for w in ADAPTED}
        theirs: dict[str, list[float]] = {w: [] for w in ADAPTED}
        for i in range(rounds + 1):
            for workload, adapters in ADAPTED.items():
                for pipe, into in ((our_pipe, ours), (theirs_pipe, theirs)):
                    pipe.send(adapters)
                    tok_s = pipe.recv()
                    if i:
                        into[workload].append(tok_s)
        for pipe in (our_pipe, theirs_pipe):
            pipe.send(None)
        return ours, theirs, our_pipe.recv()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    wait_until_quiet()
    ceilings = {
        "copy_gb_s": copy_bandwidth(arguments.device) / 1e9,
        "matmul_bf16_gflop_s": matmul_rate(torch.bfloat16, arguments.device) / 1e9,
    }
    print("ceilings: " + ", ".join(f"{name} {value:.1f}" for name, value in ceilings.items()), file=sys.stderr)
    ours, theirs, memory = measure(arguments.rounds, arguments.device)
    row: dict[str, Any] = {"device": arguments.device, **ceilings}
    print(f"{'workload':10} {'chorus tok/s':>14} {'peer tok/s':>12} {'ratio':>7}   range of ratios", file=sys.stderr)
    for workload in ADAPTED:
        peer = "transformers" if workload == "base" else "peft"
        mine, other = statistics.median(ours[workload]), statistics.median(theirs[workload])
        pairs = sorted(a / b for a, b in zip(ours[workload], theirs[workload], strict=True))
        print(
            f"{workload:10} {mine:14.1f} {other:12.1f} {mine / other:7.2f}   {pairs[0]:.2f}..{pairs[-1]:.2f}",
            file=sys.stderr,
        )
        row |= {f"{workload}_tok_s": mine, f"{workload}_{peer}_tok_s": other, f"{workload}_over_{peer}": mine / other}
    row |= memory
    print(f"memory: {memory}", file=sys.stderr)
    record("engine", row)
    if arguments.json:
        print(json.dumps({key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()}))


if __name__ == "__main__":
    main()
