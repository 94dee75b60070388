"""Hours of traffic over thousands of adapters, replayed by the real scheduler and residency on simulated time.

    python benchmarks/simulator.py [--rate 5] [--hours 1] [--adapters 10000] [--alpha 0.6] [--resident 128] [--json]
    python benchmarks/simulator.py --compare [--rate 20] [--adapters 50] [--seconds 15] [--json]

The first plans: with the cost of steps and loads as given (by default the embedded base's on two CPU cores), what would
latency and throughput be, and how often would an adapter be missing? The second says what that is worth: it calibrates
the costs with short runs of the engine, predicts a run, makes it on a live server, and prints both; a row goes to
results/simulator.jsonl.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from dataclasses import asdict, replace
from operator import mul
from pathlib import Path
from typing import Any

from chorus import allocator
from chorus.client.aio import AsyncClient
from chorus.config import ServerConfig
from chorus.engine.memory import BLOCK_SIZE
from chorus.engine.simulated_device import Cost, SimulatedAdapter, StepFeatures
from chorus.engine.simulation import Limits, Report, SimulatedRequest, Simulation
from chorus.models.checkpoint import base_folder
from common import Others, or_toy, record, wait_until_quiet
from loads.calibration import calibrate
from loads.distinct import write_adapter
from loads.figures import Outcome, figures
from loads.live_server import live_server, step_seconds
from loads.open_loop import TENANT, adapter_name, replay
from loads.tiers import TOKENS_IN, first_token_ms
from loads.trace import BASE, Workload

RANK, WARM_UP_S = 8, 2.0
# The embedded base's on two CPU cores, one thread a step.
COST = Cost(StepFeatures(0.0036, 0.002, 0.00015, 0.0004, 0.00004, 0.004, 0.003), load=0.02, overhead=0.003)
COMPARED = ("requests_s", "output_tokens_s", "step_mean", "first_token_p50", "first_token_p99", "inter_token_mean")


def cost_of(text: str) -> Cost:
    """From JSON as --compare prints it.

    Raises:
        ValueError: not a cost.
    """
    try:
        fields = json.loads(text)
        return Cost(**{**fields, "step": StepFeatures(*fields["step"])})
    except (TypeError, KeyError) as error:
        raise ValueError(f"not a cost: {error}") from error


def requests_of(workload: Workload, shared: int = 0) -> list[SimulatedRequest]:
    """A trace for the simulation; every adapter takes one unit of memory, and its prompts begin alike."""
    adapters = {i: SimulatedAdapter(adapter_name(i), 1, max_rank=RANK) for i in range(workload.adapters)}
    return [
        SimulatedRequest(
            a.at,
            a.tokens_in,
            a.tokens_out,
            None if a.adapter == BASE else adapters[a.adapter],
            shared=min(shared, a.tokens_in),
        )
        for a in workload.arrivals()
    ]


def outcomes_of(report: Report) -> list[Outcome]:
    """As a client would have seen the answers."""
    outcomes = []
    for answer in report.answers:
        outcome = Outcome(answer.request.at, answer.request.at, error=answer.error)
        outcome.adapter_wait = float(answer.waited_for_adapter)
        if answer.first_token is not None and answer.finished is not None:
            outcome.messages = [(answer.first_token, 1), (answer.finished, answer.tokens - 1)]
        outcomes.append(outcome)
    return outcomes


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, help="requests/s; 5, or 20 with --compare")
    parser.add_argument("--hours", type=float, default=or_toy(1.0, 0.01))
    parser.add_argument("--adapters", type=int, help="10000, or 50 with --compare")
    parser.add_argument("--alpha", type=float, default=0.6, help="skew of the adapters; 1 is uniform, less is more")
    parser.add_argument("--cv", type=float, default=1.0, help="burstiness; 1 is Poisson")
    parser.add_argument("--input", type=int, nargs=2, default=[8, 128], metavar=("LOW", "HIGH"), help="prompt tokens")
    parser.add_argument("--output", type=int, nargs=2, default=[8, 128], metavar=("LOW", "HIGH"), help="new tokens")
    parser.add_argument("--resident", type=int, default=128, help="adapters that fit on the device")
    parser.add_argument(
        "--in-host", type=int, default=0, help="adapters whose copies fit into host memory; without --compare"
    )
    parser.add_argument("--max-rows", type=int, default=64)
    parser.add_argument("--kv-tokens", type=int, default=262144, help="tokens that fit into the KV cache")
    parser.add_argument("--shared", type=int, default=0, help="tokens at the beginning of all prompts to an adapter")
    parser.add_argument("--cost", type=cost_of, default=COST, metavar="JSON", help="the cost that --compare has fitted")
    parser.add_argument("--compare", action="store_true", help="with a live server on this machine")
    parser.add_argument("--seconds", type=float, default=15.0, help="of arrivals, with --compare")
    parser.add_argument("--threads", type=int, default=1, help="of a step, with --compare")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    return parser.parse_args()


def workload_of(arguments: argparse.Namespace) -> Workload:
    compare = arguments.compare
    return Workload(
        rate=arguments.rate or (20.0 if compare else 5.0),
        duration=arguments.seconds if compare else arguments.hours * 3600,
        adapters=(50 if compare else 10_000) if arguments.adapters is None else arguments.adapters,
        alpha=arguments.alpha,
        cv=arguments.cv,
        tokens_in=tuple(arguments.input),
        tokens_out=tuple(arguments.output),
    )


def simulate(
    workload: Workload, limits: Limits, cost: Cost, shared: int = 0, warm_up: Workload | None = None
) -> dict[str, Any]:
    """The figures that a client would report, and what the engine did for them, after a `warm_up`."""
    began = time.perf_counter()
    simulation = Simulation(limits, cost)
    if warm_up:
        simulation.run(requests_of(warm_up))
    report = simulation.run(requests_of(workload, shared))
    return {
        **figures(outcomes_of(report)),
        "steps": report.steps,
        "step_mean": report.busy / report.steps,
        "computed_tokens": report.computed,
        "preemptions": report.preemptions,
        "loads": report.loads,
        "from_host": report.from_host,
        "evictions": report.evictions,
        "simulated_in_s": time.perf_counter() - began,
    }


def plan(arguments: argparse.Namespace) -> dict[str, Any]:
    limits = Limits(
        kv_blocks=arguments.kv_tokens // BLOCK_SIZE,
        block_size=BLOCK_SIZE,
        adapter_bytes=arguments.resident,
        adapter_host_bytes=arguments.in_host,
        max_rows=arguments.max_rows,
    )
    row = simulate(workload_of(arguments), limits, arguments.cost, arguments.shared)
    for name, value in row.items():
        print(f"{name:22} {value if isinstance(value, dict) else round(value, 4)}", file=sys.stderr)
    return row


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Predicted and measured figures of the same trace, and the fitted costs."""
    workload = workload_of(arguments)
    shape = json.loads((base_folder(None) / "config.json").read_text())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = ServerConfig(state_dir=folder / "state", threads=arguments.threads, max_rows=arguments.max_rows)
        cost, memory = calibrate(config, shape, folder / "calibration", [RANK])
        measured, idle_s = asyncio.run(_live(arguments, workload, shape, folder))
    first_step = StepFeatures(1, 0, 1, 0, TOKENS_IN, 1, 0)
    cost = replace(cost, overhead=max(idle_s - sum(map(mul, cost.step, first_step)), 0.0))
    limits = Limits(
        kv_blocks=memory.kv_blocks,
        block_size=memory.block_size,
        adapter_bytes=memory.adapter_rows // RANK,
        max_rows=arguments.max_rows,
        context_length=memory.context_length,
    )
    predicted = simulate(workload, limits, cost, warm_up=warm_up_of(workload))
    print(f"cost: {json.dumps(asdict(cost))}", file=sys.stderr)
    print(f"{'':18} {'predicted':>10} {'measured':>10} {'ratio':>7}", file=sys.stderr)
    for figure in COMPARED:
        p, m = predicted[figure], measured[figure]
        print(f"{figure:18} {p:10.4f} {m:10.4f} {p / m:7.2f}", file=sys.stderr)
    row = {
        "rate": workload.rate,
        "adapters": workload.adapters,
        "duration": workload.duration,
        "cost": asdict(cost),
        "predicted": predicted,
        "measured": measured,
        **{f"{figure}_predicted_over_measured": predicted[figure] / measured[figure] for figure in COMPARED},
    }
    record("simulator", row)
    return row


def warm_up_of(workload: Workload) -> Workload:
    """What the server has answered before it is measured, and the simulated one too."""
    return replace(workload, duration=WARM_UP_S, rate=min(workload.rate, 10.0))


async def _live(
    arguments: argparse.Namespace, workload: Workload, shape: dict[str, int], folder: Path
) -> tuple[dict[str, Any], float]:
    """The figures of a live run, and the seconds of a first token on the idle server."""
    # No copies in host memory: the prediction has none.
    options = ("--threads", str(arguments.threads), "--max-rows", str(arguments.max_rows), "--adapter-host-mb", "0")
    with live_server(folder / "state", *options) as server:
        async with AsyncClient(server.inference, admin=server.admin) as client:
            for i in range(workload.adapters):
                path = write_adapter(shape, folder / adapter_name(i), i, [RANK])
                await client.push(path, tenant=TENANT, name=adapter_name(i))
            vocabulary = shape["vocab_size"]
            idle = await first_token_ms(client, server.state_dir, [], vocabulary)
            others = Others()
            await replay(client, warm_up_of(workload).arrivals(), vocabulary)
            before = step_seconds(server.metrics)
            measured = figures(await replay(client, workload.arrivals(), vocabulary))
            spent, steps = (b - a for a, b in zip(before, step_seconds(server.metrics), strict=True))
            measured |= {"steps": steps, "step_mean": spent / steps}
            return {**measured, "others_cores": others.refuse()}, idle["first_token_base_ms"] / 1e3


def main() -> None:
    arguments = parse()
    if arguments.compare:
        wait_until_quiet()
    row = compare(arguments) if arguments.compare else plan(arguments)
    if arguments.json:
        print(json.dumps(row))


if __name__ == "__main__":
    allocator.start_again()  # as a server's engine
    main()
