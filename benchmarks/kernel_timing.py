"""Seconds of a call: CUDA events around passes, replayed from a graph where launches would hide what is measured.

The same code runs on a CPU, over wall clock, for the benchmarks' tests.
"""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

Work = Callable[[], object]
PASSES = 11
GRAPH_ROWS = 256  # decodes; above, the work hides its launches


class Ceilings(NamedTuple):
    """Bytes a second, FLOP a second, and the seconds of one empty launch in a graph (0 where there are none)."""

    read: float
    matmul: float
    launch: float

    def floor(self, bytes_moved: float, flops: float, launches: int) -> float:
        """Seconds that no implementation is under."""
        return max(bytes_moved / self.read, flops / self.matmul, launches * self.launch)


def seconds(work: Work, rows: int, device: str) -> float:
    """Median of a pass over a batch of `rows` rows; on CUDA from a graph, so that few rows cost what its nodes do."""
    if device == "cuda":
        return event_seconds(captured(work) if rows <= GRAPH_ROWS else work)
    return wall_seconds(work)


def empty_launch() -> float:
    """Seconds of one node of a CUDA graph that does next to nothing."""
    one, count = torch.zeros(1, device="cuda"), 100
    return event_seconds(captured(lambda: [one.zero_() for _ in range(count)])) / count


def captured(work: Work) -> Work:
    """Replays it from a graph; it has run once, on a stream of its own, so that nothing is compiled while capturing."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    replay: Work = graph.replay
    return replay


def event_seconds(work: Work) -> float:
    """Median by CUDA events, after two passes that are not counted."""
    times: list[float] = []
    for i in range(PASSES + 2):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        work()
        ended.record()
        ended.synchronize()
        if i >= 2:
            times.append(began.elapsed_time(ended) / 1e3)
    return statistics.median(times)


def wall_seconds(work: Work) -> float:
    times = []
    for i in range(PASSES + 2):
        began = time.perf_counter()
        work()
        if i >= 2:
            times.append(time.perf_counter() - began)
    return statistics.median(times)
