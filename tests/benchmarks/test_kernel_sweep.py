"""The operators' benchmark in small, on a CPU: every contestant, a peer, floors, the keys that others read."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import kernel_cases
import kernel_sweep
import kernel_timing
from kernel_cases import LowRankCase, layer_groups, low_rank_case, low_rank_contestants, static_contestants
from kernel_sweep import SweepCase, llama_cases, single, sweep
from kernel_timing import Ceilings

SCRIPT = Path(kernel_sweep.__file__).with_name("kernels.py")
CEILINGS = Ceilings(1e9, 1e12, 0.0)
SMALL_LAYER = layer_groups(32, 16, 64)


@pytest.fixture
def _small_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_sweep, "PASS_BYTES", 2**16)
    monkeypatch.setattr(kernel_timing, "PASSES", 1)


@pytest.mark.usefixtures("_small_passes")
def test_every_contestant_and_a_peer_are_timed_on_the_same_inputs() -> None:
    seen: list[LowRankCase] = []

    def peer(op: str, inputs: Any) -> Callable[[], object]:
        assert op == "low_rank"
        seen.append(inputs)
        return lambda: inputs.y[0].add_(1)

    cases = [single(32, 64, 4, (16,) * 4), SweepCase("layer", SMALL_LAYER, 4, (8, 16))]
    rows = list(sweep(cases, CEILINGS, {"toy": peer}, "cpu"))
    assert [row["case"] for row in rows] == ["32x64 rows 4 adapters 4 r16", "layer rows 4 adapters 2 mixed"]
    names = {"chorus", "base linears", "loop over adapters", "padded bmm", "all slots in one GEMM", "toy"}
    assert all(set(row["seconds"]) == names and min(row["seconds"].values()) > 0 for row in rows)
    assert [len(inputs.groups) for inputs in seen] == [case.copies * len(case.groups) for case in cases]
    assert cases[0].copies > 1


@pytest.mark.usefixtures("_small_passes")
def test_static_plans_of_each_family_are_timed_where_a_case_says_so() -> None:
    cases = [SweepCase("layer", SMALL_LAYER, 4, (8, 16), static=static) for static in (False, True)]
    without, with_them = (set(row["seconds"]) for row in sweep(cases, CEILINGS, {}, "cpu"))
    assert with_them - without == {"static small", "static grouped", "static slots"}


@pytest.mark.parametrize("ranks", [(16, 16), (8, 32)])
def test_contestants_of_low_rank_compute_the_same(ranks: tuple[int, ...]) -> None:
    results = []
    ours = ("chorus", "static small", "static grouped", "static slots")
    for name in (*ours, "loop over adapters", "padded bmm", "all slots in one GEMM"):
        case = low_rank_case("cpu", SMALL_LAYER, 6, ranks, torch.float32)
        before = [y.clone() for y in case.y]
        (low_rank_contestants(case) | static_contestants(case))[name]()
        results.append([y - old for y, old in zip(case.y, before, strict=True)])
    assert min(delta.abs().max() for delta in results[0]) > 1
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-3)


def test_sites_that_read_the_same_x_share_it_and_are_one_group() -> None:
    case = low_rank_case("cpu", SMALL_LAYER * 2, 4, (8, 8))
    assert case.groups == [(0, 3), (3, 4), (4, 6), (6, 7), (7, 10), (10, 11), (11, 13), (13, 14)]
    assert case.x[0] is case.x[2]
    assert case.x[2] is not case.x[3]
    assert [tuple(weight.shape) for weight in case.weight[:7]] == [
        (32, 32),
        (16, 32),
        (16, 32),
        (32, 32),
        (64, 32),
        (64, 32),
        (32, 64),
    ]


def test_base_weights_come_round_again_once_they_are_past_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cases, "PASS_BYTES", 2 * 2 * 32 * 64)
    case = low_rank_case("cpu", [(32, (64,))] * 5, 4, (8,))
    assert len({id(weight) for weight in case.weight}) == 2
    assert case.weight[0] is case.weight[2]
    assert case.weight[0] is not case.weight[1]


def test_a_floor_is_the_largest_of_bytes_flops_and_launches() -> None:
    case = single(4096, 1024, 64, (16,) * 64)
    bytes_moved = 2 * 5120 * 1024 + 2 * 64 * (4096 + 2048)
    assert case.floor(Ceilings(1e9, 1e15, 0.0)) == pytest.approx(bytes_moved / 1e9)
    assert case.floor(Ceilings(1e15, 1e9, 0.0)) == pytest.approx(2 * 5120 * 1024 / 1e9)
    assert case.floor(Ceilings(1e15, 1e15, 5e-6)) == pytest.approx(5e-6)


def test_a_cases_bytes_are_those_of_its_tensors() -> None:
    case = SweepCase("layer", SMALL_LAYER, 4, (8, 16))
    assert case.bytes == low_rank_case("cpu", case.groups, case.rows, case.ranks).bytes


def test_llamas_cases_span_what_the_targets_name() -> None:
    cases = list(llama_cases())
    assert {case.rows for case in cases} >= {1, 64, 2048, 8192}
    assert {len(case.ranks) for case in cases} >= {1, 8, 256}
    assert {rank for case in cases for rank in case.ranks} >= {8, 16, 128}
    assert all(case.rows % len(case.ranks) == 0 for case in cases)
    assert len({case.name for case in cases}) == len(cases)


def test_the_cases_that_the_predictions_name_are_swept() -> None:
    page = (SCRIPT.parents[1] / "docs/kernels-predictions.md").read_text()
    named = re.findall(r"`(\w+\s+rows \d+ adapters \d+ \w+)`", page)
    assert len(named) == 8
    assert set(named) <= {case.name for case in llama_cases()}


def test_without_a_cuda_device_the_benchmark_says_so() -> None:
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), "--device", "cuda"]
    ran = subprocess.run(command, env=hidden, capture_output=True, text=True, check=False)
    assert ran.returncode != 0
    assert ran.stderr.strip() == "--device cuda: torch finds no CUDA device here"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """kernels.py by its path: a library's optional module has its name."""
    spec = spec_from_file_location("kernels_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    for ceiling in ("read_bandwidth", "copy_bandwidth"):
        monkeypatch.setattr(module, ceiling, lambda device: 1e10)
    monkeypatch.setattr(module, "matmul_rate", lambda dtype, device: 1e12)
    monkeypatch.setattr(module, "step_groups", lambda: SMALL_LAYER)
    monkeypatch.setattr(module, "CONTEXTS", (40,))
    monkeypatch.setattr(module, "ROUNDS", 1)
    return module


def test_a_row_on_a_cpu_has_the_two_ratios(script: ModuleType) -> None:
    with torch.inference_mode():
        row = script.measure(["low_rank", "paged_attention"], {}, "cpu")
    assert row["low_rank_16x16_over_base_linears"] > 0
    assert row["paged_attention_speedup_over_folded_sdpa"][40] > 0
    assert set(row["low_rank"]) == {"seconds", "gb_s", "floor_over_time"}
