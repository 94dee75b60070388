"""What gRPC leaves of the engine's tokens/s: the same work stepped in a process of its own and through a live server.

    python benchmarks/front_end.py [--json] [--rounds 5] [--streams 32] [--threads 1]

The embedded base, greedy, 16 tokens in, 64 to 192 out; each stream sends four requests, one after the other. The
engine alone, and `chorus serve` with a client in a third process, take turns. Then 200 single requests to the idle
server: from arrival to first engine step.
Prints a table, and with --json one JSON line last; a row goes to results/front_end.jsonl.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc

from chorus import allocator
from common import or_toy, record, wait_until_quiet
from loads.live_server import live_server

TOKENS_IN, REQUESTS_EACH, IDLE_REQUESTS = 16, or_toy(4, 1), or_toy(200, 5)


def prompt(i: int) -> list[int]:
    return [(17 * i + 7 * j) % 400 + 20 for j in range(TOKENS_IN)]


def tokens_out(stream: int, turn: int) -> int:
    """64 to 192, so that streams do not stay in step."""
    return 64 + (37 * stream + 61 * turn) % 129


def all_tokens(streams: int) -> int:
    return sum(tokens_out(i, turn) for i in range(streams) for turn in range(REQUESTS_EACH))


def engine_alone(streams: int, threads: int) -> Callable[[], float]:
    """A function that generates with the engine alone and returns its tokens/s."""
    from chorus.config import ServerConfig
    from chorus.engine import messages as m
    from chorus.engine.imports import leave_out_triton

    leave_out_triton()  # as the server's engine
    from loads.alone import alone

    engine, _, _ = alone(ServerConfig(threads=threads))

    def submit(stream: int, turn: int) -> m.Submit:
        sampling = m.Sampling(tokens_out(stream, turn), temperature=0.0, ignore_eos=True)
        return m.Submit(stream * REQUESTS_EACH + turn, tuple(prompt(stream)), sampling)

    def run() -> float:
        commands = [submit(i, 0) for i in range(streams)]
        tokens, total = 0, all_tokens(streams)
        began = time.perf_counter()
        while tokens < total:
            events = [event for event in engine.step(commands).events if isinstance(event, m.Tokens)]
            tokens += sum(len(event.token_ids) for event in events)
            ended = [divmod(event.request_id, REQUESTS_EACH) for event in events if event.finish]
            commands = [submit(i, turn + 1) for i, turn in ended if turn + 1 < REQUESTS_EACH]
        return tokens / (time.perf_counter() - began)

    return run


def client_of(target: str, streams: int) -> tuple[Callable[[], dict[str, float]], Callable[[], list[float]]]:
    """Functions that call a live server: all streams at once -> tokens/s; one after the other -> queue seconds."""
    from chorus.v1 import generate_pb2, inference_pb2_grpc

    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    channel = grpc.aio.insecure_channel(target)
    stub = inference_pb2_grpc.InferenceStub(channel)

    def request(i: int, tokens: int) -> generate_pb2.GenerateRequest:
        sampling = generate_pb2.SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        return generate_pb2.GenerateRequest(token_ids=generate_pb2.TokenIds(ids=prompt(i)), sampling=sampling)

    async def one(i: int) -> tuple[int, int]:
        tokens = messages = 0
        for turn in range(REQUESTS_EACH):
            async for response in stub.Generate(request(i, tokens_out(i, turn))):
                tokens, messages = tokens + len(response.token_ids), messages + 1
        return tokens, messages

    async def all_at_once() -> dict[str, float]:
        began = time.perf_counter()
        got = await asyncio.gather(*(one(i) for i in range(streams)))
        seconds = time.perf_counter() - began
        tokens = sum(tokens for tokens, _ in got)
        assert tokens == all_tokens(streams)
        return {"tok_s": tokens / seconds, "tokens_per_message": tokens / sum(messages for _, messages in got)}

    async def one_by_one() -> list[float]:
        queued = []
        for i in range(IDLE_REQUESTS):
            async for response in stub.Generate(request(i, 1)):
                last = response
            queued.append(last.timing.queue.ToNanoseconds() / 1e9)
            await asyncio.sleep(0.005)
        return queued

    def call(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        return loop.run_until_complete(work())

    return lambda: call(all_at_once), lambda: call(one_by_one)


def serve_engine(streams: int, threads: int, pipe: Connection) -> None:
    run = engine_alone(streams, threads)
    while pipe.recv():
        pipe.send(run())


def serve_client(target: str, streams: int, pipe: Connection) -> None:
    all_at_once, one_by_one = client_of(target, streams)
    while asked := pipe.recv():
        pipe.send(all_at_once() if asked == "all" else one_by_one())


def start(work: Callable[..., None], *arguments: object) -> Connection:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=work, args=(*arguments, theirs), daemon=True).start()
    return ours


def ask(pipe: Connection, what: str) -> Any:
    pipe.send(what)
    return pipe.recv()


def measure(rounds: int, streams: int, threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, live_server(Path(folder), "--threads", str(threads)) as server:
        client = start(serve_client, server.inference, streams)
        os.environ |= allocator.told(os.environ)  # as the server's engine
        engine = start(serve_engine, streams, threads)
        pairs = [(ask(engine, "all"), ask(client, "all")) for _ in range(rounds + 1)][1:]
        queued = sorted(ask(client, "idle"))
        for pipe in (engine, client):
            pipe.send(None)
    ratios = sorted(through["tok_s"] / alone for alone, through in pairs)
    return {
        "streams": streams,
        "threads": threads,
        "engine_tok_s": statistics.median(alone for alone, _ in pairs),
        "client_tok_s": statistics.median(through["tok_s"] for _, through in pairs),
        "client_over_engine": statistics.median(ratios),
        "client_over_engine_range": (ratios[0], ratios[-1]),
        "tokens_per_message": statistics.median(through["tokens_per_message"] for _, through in pairs),
        "first_step_ms_p50": statistics.median(queued) * 1e3,
        "first_step_ms_p99": queued[int(len(queued) * 0.99)] * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument("--rounds", type=int, default=or_toy(5, 1))
    parser.add_argument("--streams", type=int, default=or_toy(32, 2))
    parser.add_argument("--threads", type=int, default=1, help="of a step, in both engines")
    arguments = parser.parse_args()
    wait_until_quiet()
    row = measure(arguments.rounds, arguments.streams, arguments.threads)
    for name, value in row.items():
        print(f"{name:26} {value if isinstance(value, tuple) else round(value, 3)}", file=sys.stderr)
    record("front_end", row)
    if arguments.json:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
