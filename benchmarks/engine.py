"""The engine's tokens/s on CPU beside transformers, peft and, if asked, vLLM, interleaved in one run.

    python benchmarks/engine.py [--peers vllm | --alone | --against FOLDER] [--profile] [--json] [--rounds 3]

16 requests, 64 tokens in, 64 out, greedy, bf16, a 144M Llama shape; adapters of rank 16 on all seven linears. Peers get
the same numbers in float32 on a CPU without instructions for bfloat16, where that is faster for them by far. Each
contestant is a process of its own with the same weights, and they take turns; ratios are of medians. A decode step is
compared with its floor: its linears alone, and the adapters' bytes read once. Prints the ceilings first, a table, with
--profile where a step's time goes, and with --json one JSON line last; a row goes to results/engine.jsonl.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from common import Others, copy_bandwidth, matmul_rate, or_toy, peer_dtype, record, wait_until_quiet
from peers import vllm_cpu
from peers.checkout import Checkout
from peers.process import Answer, Contestant
from peers.work import WORKLOADS, save_weights

EFFICIENCY_OF = ("base", "mixed16")


class Field:
    """The contestants, and who does which workload."""

    def __init__(
        self, folder: Path, device: str, peers: tuple[str, ...], against: Path | None, open_ones: ExitStack
    ) -> None:
        def enter(contestant: Contestant) -> Contestant:
            return open_ones.enter_context(closing(contestant))

        dtype = str(peer_dtype(device)).removeprefix("torch.")
        self.chorus = enter(Contestant("peers.chorus_engine", str(folder), device))
        self.floor = enter(Contestant("step_floor", device))
        self.base: dict[str, Contestant] = {}
        self.adapted: dict[str, Contestant] = {}
        if "transformers" in peers:
            both = enter(Contestant("peers.transformers_peft", str(folder), device, dtype))
            self.base["transformers"], self.adapted["peft"] = both, both
        if against is not None:
            checkout = Checkout(against, str(folder), device)
            enter(checkout)
            self.base["checkout"], self.adapted["checkout"] = checkout, checkout
        if "vllm" in peers:
            self.base["vllm"], self.adapted["vllm"] = (
                enter(vllm_cpu.start(folder, dtype, lora=lora)) for lora in (False, True)
            )

    def peers_of(self, workload: str) -> dict[str, Contestant]:
        return self.adapted if WORKLOADS[workload] else self.base


@contextmanager
def contestants(device: str, peers: tuple[str, ...], against: Path | None) -> Iterator[Field]:
    with tempfile.TemporaryDirectory() as name, ExitStack() as open_ones:
        save_weights(Path(name))
        yield Field(Path(name), device, peers, against, open_ones)


def measure(field: Field, rounds: int) -> tuple[dict[tuple[str, str], list[Answer]], list[Answer]]:
    """Answers by workload and contestant, one a round, all in turns, and the floor's; the first round is a warm-up."""
    answers: dict[tuple[str, str], list[Answer]] = {}
    floors = []
    for turn in range(rounds + 1):
        for workload, adapters in WORKLOADS.items():
            given = {"adapters": adapters, "turn": turn}
            got = {"chorus": _ask_in_quiet(field.chorus, ask="run", **given)}
            got |= {name: _ask_in_quiet(peer, **given) for name, peer in field.peers_of(workload).items()}
            if turn:
                for name, answer in got.items():
                    answers.setdefault((workload, name), []).append(answer)
        floors.append(_ask_in_quiet(field.floor))
    return answers, floors[1:]


def _ask_in_quiet(contestant: Contestant, **question: Any) -> Answer:
    """Once nobody keeps a core busy: vLLM does for a second after it has answered."""
    wait_until_quiet(0.2)
    return contestant.ask(**question)


def median(answers: list[Answer], name: str) -> float:
    return float(statistics.median(answer[name] for answer in answers))


def speed_row(field: Field, answers: dict[tuple[str, str], list[Answer]]) -> dict[str, Any]:
    """Tokens/s, ratios and the ranges of their pairs, of all workloads; prints them as a table."""
    row: dict[str, Any] = {}
    print(f"{'workload':10} {'chorus tok/s':>14} {'peer tok/s':>12} {'ratio':>7}   range of ratios", file=sys.stderr)
    for workload in WORKLOADS:
        ours = answers[workload, "chorus"]
        mine = row[f"{workload}_tok_s"] = median(ours, "tok_s")
        row[f"{workload}_step_ms"] = median(ours, "decode_step_ms")
        print(f"{workload:10} {mine:14.1f}", file=sys.stderr)
        for name in field.peers_of(workload):
            theirs = answers[workload, name]
            other = median(theirs, "tok_s")
            pairs = sorted(a["tok_s"] / b["tok_s"] for a, b in zip(ours, theirs, strict=True))
            print(f"  {name:22} {other:12.1f} {mine / other:9.2f}   {pairs[0]:.2f}..{pairs[-1]:.2f}", file=sys.stderr)
            over = f"{workload}_over_{name}"
            row |= {f"{workload}_{name}_tok_s": other, over: mine / other, f"{over}_range": [pairs[0], pairs[-1]]}
    return row


def efficiency_row(speed: dict[str, Any], floors: list[Answer]) -> dict[str, float]:
    """What share of a decode step the floor is."""
    row = {name: median(floors, name) for name in ("linears_ms", "read_gb_s", "adapter_ms")}
    for workload in EFFICIENCY_OF:
        floor = row["linears_ms"] + WORKLOADS[workload] * row["adapter_ms"]
        step = speed[f"{workload}_step_ms"]
        row |= {f"{workload}_floor_ms": floor, f"decode_efficiency_{workload}": floor / step}
        print(
            f"{workload:10} decode step {step:7.2f} ms, floor {floor:6.2f} ms "
            f"(linears {row['linears_ms']:.2f}, adapters {floor - row['linears_ms']:.2f}), "
            f"efficiency {floor / step:.2f}",
            file=sys.stderr,
        )
    return row


def profile_row(field: Field) -> dict[str, dict[str, float]]:
    """Where the time of a decode step that is not recorded goes, by workload; prints it beside the floor."""
    row = {}
    for workload in EFFICIENCY_OF:
        parts = field.chorus.ask(ask="profile", adapters=WORKLOADS[workload], turn=-1)["parts_ms"]
        row[f"{workload}_profile_ms"] = parts
        print(f"{workload}: a decode step of {sum(parts.values()):.2f} ms, operator by operator", file=sys.stderr)
        for name, spent in sorted(parts.items(), key=lambda part: -part[1]):
            print(f"  {name:28} {spent:7.2f} ms   {spent / sum(parts.values()):4.0%}", file=sys.stderr)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument("--rounds", type=int, default=or_toy(3, 1))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    others = parser.add_mutually_exclusive_group()
    others.add_argument("--peers", choices=("vllm",), nargs="+", default=[], help="besides transformers and peft")
    others.add_argument("--alone", action="store_true", help="our engine only")
    others.add_argument("--against", type=Path, metavar="FOLDER", help="beside another checkout's engine only")
    parser.add_argument("--profile", action="store_true", help="where a decode step's time goes; CPU only")
    arguments = parser.parse_args()
    if arguments.device != "cpu" and (arguments.profile or arguments.peers):
        parser.error("--profile and --peers vllm need --device cpu")
    if "vllm" in arguments.peers:
        try:
            vllm_cpu.require()
        except FileNotFoundError as error:
            sys.exit(str(error))
    peers = () if arguments.alone or arguments.against else ("transformers", *arguments.peers)
    wait_until_quiet()
    ceilings = {
        "copy_gb_s": copy_bandwidth(arguments.device) / 1e9,
        "matmul_gflop_s": matmul_rate(peer_dtype(arguments.device), arguments.device) / 1e9,
    }
    print("ceilings: " + ", ".join(f"{name} {value:.1f}" for name, value in ceilings.items()), file=sys.stderr)
    dtype = str(peer_dtype(arguments.device)).removeprefix("torch.")
    row: dict[str, Any] = {"device": arguments.device, "peer_dtype": dtype, **ceilings}
    if arguments.against:
        row["against"] = Checkout.commit_of(arguments.against)
    with contestants(arguments.device, peers, arguments.against) as field:
        neighbours = Others()
        answers, floors = measure(field, arguments.rounds)
        speed = speed_row(field, answers)
        row |= speed | efficiency_row(speed, floors)
        row |= profile_row(field) if arguments.profile else {}
        memory = field.chorus.ask(ask="memory")
        row["others_cores"] = neighbours.cores()
    print(f"memory: {memory}", file=sys.stderr)
    print(f"others kept {row['others_cores']:.2f} cores busy", file=sys.stderr)
    row |= memory
    record("engine", row)
    if arguments.json:
        print(json.dumps({key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()}))


if __name__ == "__main__":
    main()
