"""The sweep of `paged_attention` in small, on a CPU: contestants that agree, bytes, FLOPs and copies of its cases."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import attention_sweep
import kernel_timing
from attention_sweep import (
    LLAMA_8B,
    AttentionSweepCase,
    Heads,
    attention_cases,
    contestants_of,
    inputs_of,
)
from chorus.kernels import reference
from kernel_timing import Ceilings, Work

SMALL = Heads(4, 2, 16, 16)
CASES = [
    AttentionSweepCase(3, 40),
    AttentionSweepCase(1, 5),
    AttentionSweepCase(0, 0, 20, 0),
    AttentionSweepCase(2, 33, 7, 30),
]


@pytest.fixture(autouse=True)
def _small_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_sweep, "PASS_BYTES", 2**16)
    monkeypatch.setattr(kernel_timing, "PASSES", 1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_contestants_compute_attention_of_every_copy(case: AttentionSweepCase) -> None:
    inputs = inputs_of(case, SMALL, "cpu", torch.float32)
    copies = list(zip(inputs.k_cache, inputs.v_cache, strict=True))
    assert len(copies) == case.copies(SMALL)
    for work in contestants_of(inputs).values():
        outputs: Any = work()
        for out, (k_cache, v_cache) in zip(outputs, copies, strict=True):
            exact = reference.paged_attention(
                inputs.query.double(), k_cache.double(), v_cache.double(), inputs.rows, scale=0.25
            )
            assert float((out - exact).square().mean().sqrt()) <= 1e-5 * float(exact.square().mean().sqrt())


def test_a_row_has_each_contestant_a_peer_and_the_floor() -> None:
    def peer(op: str, inputs: Any) -> Work | None:
        return (lambda: inputs.query + len(inputs.rows)) if op == "paged_attention" else None

    ceilings = Ceilings(1e9, 1e12, 0.0)
    rows = list(attention_sweep.attention_sweep(CASES, SMALL, ceilings, {"toy": peer}, "cpu"))
    assert [row["case"] for row in rows] == [
        "decode 3 x 40",
        "decode 1 x 5",
        "chunk 20 over 0",
        "decode 2 x 33 and chunk 7 over 30",
    ]
    for row in rows:
        assert set(row["seconds"]) == {"chorus", "SDPA over dense keys", "toy"}
        assert row["floor_over_time"] == pytest.approx(row["floor"] / row["seconds"]["chorus"])


def test_bytes_and_flops_are_those_of_the_batch() -> None:
    case = AttentionSweepCase(2, 33, 7, 30)
    inputs = inputs_of(case, SMALL, "cpu")
    tokens = sum(row.context for row in inputs.rows)
    per_token = 2 * SMALL.key * SMALL.dim * 2
    assert case.bytes(SMALL) == tokens * per_token + 2 * inputs.query.nbytes
    assert inputs.bytes == tokens * per_token * len(inputs.k_cache)
    seen = 33 + 33 + sum(range(31, 38))
    assert case.flops(SMALL) == seen * SMALL.query * SMALL.dim * 2 * 2


def test_the_cases_that_the_predictions_name_are_swept() -> None:
    page = (Path(__file__).parents[2] / "docs/kernels-predictions.md").read_text()
    named = re.findall(r"`((?:decode|chunk) [^`]+)`", page)
    cases = {case.name: case for case in attention_cases()}
    assert set(named) == set(cases)
    assert cases["decode 64 x 2048"].bytes(LLAMA_8B) == pytest.approx(537e6, rel=0.01)
    assert cases["chunk 2048 over 0"].flops(LLAMA_8B) == pytest.approx(34e9, rel=0.02)
