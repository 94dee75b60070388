"""The least that a decode step of the benchmark's shape takes: its linears alone, and its adapters' bytes read once.

Linears: the seven of each layer and lm_head over 16 rows, on CPU in the layout that oneDNN prefers, in turn, each with
memory of its own as in a model. Where oneDNN refuses bfloat16: their products at the rate of a large one in float32, or
their bytes in bfloat16, whichever takes longer. Adapters: A and B of each distinct one, at the bandwidth that a large
product reads with. Attention, norms and sampling count as nothing.
"""

import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from chorus import allocator
from common import SHAPE_144M, matmul_rate, median_seconds, peer_dtype, read_bandwidth
from peers.process import serve
from peers.work import RANK, REQUESTS


def linears() -> Iterator[tuple[int, int]]:
    """(in, out) of a layer's seven linears."""
    hidden, ffn = SHAPE_144M["hidden_size"], SHAPE_144M["intermediate_size"]
    kv = SHAPE_144M["num_key_value_heads"] * SHAPE_144M["head_dim"]
    yield from [(hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden)]
    yield from [(hidden, ffn), (hidden, ffn), (ffn, hidden)]


def adapter_bytes() -> int:
    """A and B in bf16 of one adapter on all linears."""
    layers: int = SHAPE_144M["num_hidden_layers"]
    return layers * sum(RANK * (k + n) * 2 for k, n in linears())


class StepFloor:
    """Holds the linears' weights, so that measuring again costs nothing else."""

    def __init__(self, device: str) -> None:
        head = (SHAPE_144M["hidden_size"], SHAPE_144M["vocab_size"])
        shapes = [*(shape for _ in range(SHAPE_144M["num_hidden_layers"]) for shape in linears()), head]
        self._device = device
        self._products: int = sum(k * n for k, n in shapes)
        self._weights: list[tuple[int, torch.Tensor]] = []
        if peer_dtype(device) == torch.bfloat16:
            self._x = {k: torch.randn(REQUESTS, k, device=device).bfloat16() for k, _ in shapes}
            self._weights = [(k, self._lay_out(torch.randn(n, k, device=device).bfloat16())) for k, n in shapes]

    @torch.inference_mode()
    def measure(self) -> dict[str, float]:
        """Milliseconds of the linears, GB/s, and the milliseconds that one adapter's bytes take."""
        bandwidth = read_bandwidth(self._device)
        return {
            "linears_ms": self._linears(bandwidth) * 1e3,
            "read_gb_s": bandwidth / 1e9,
            "adapter_ms": adapter_bytes() / bandwidth * 1e3,
        }

    def _linears(self, bandwidth: float) -> float:
        """Seconds."""
        if self._weights:
            return median_seconds(self._run, 10)
        of_products = 2 * REQUESTS * self._products / matmul_rate(torch.float32, self._device)
        return max(of_products, 2 * self._products / bandwidth)

    def _lay_out(self, weight: torch.Tensor) -> torch.Tensor:
        if self._device != "cpu":
            return weight
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, REQUESTS)
        return packed

    def _run(self) -> None:
        for k, weight in self._weights:
            if self._device == "cpu":
                torch.ops.mkldnn._linear_pointwise(self._x[k], weight, None, "none", [], "")
            else:
                F.linear(self._x[k], weight)


if __name__ == "__main__":
    allocator.start_again()  # the least as there, too
    serve(lambda: StepFloor(sys.argv[1]).measure)
