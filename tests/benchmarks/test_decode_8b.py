"""What a step of Llama-3-8B's shape must read, counted by transformers; and the toy run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import decode_8b
from support.server import ENVIRONMENT


def test_a_floor_is_the_bytes_of_linears_keys_values_and_adapters() -> None:
    config = AutoConfig.for_model(**decode_8b.SHAPE_8B)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linears = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)]
    head = model.get_output_embeddings().weight
    weights = 2 * sum(weight.numel() for weight in linears)
    adapter = 2 * sum(16 * sum(weight.shape) for weight in linears if weight is not head)
    row = 512 * 32 * 2 * 8 * 128 * 2
    floors = decode_8b.floors(1e12)
    assert floors["base_1"] == pytest.approx((weights + row) / 1e9)
    assert floors["adapters_64"] == pytest.approx((weights + 64 * (row + adapter)) / 1e9)


def test_a_toy_run_tells_each_steps_time_floor_and_share(tmp_path: Path) -> None:
    command = [sys.executable, decode_8b.__file__, "--device", "cpu", "--json"]
    environment = {**os.environ, **ENVIRONMENT, "BENCHMARK_SMOKE": str(tmp_path)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert ran.returncode == 0, ran.stderr
    row = json.loads(ran.stdout.splitlines()[-1])
    cases = {"base_1", "base_2", "adapters_2"}
    for part in ("steps_ms", "steps_without_overlap_ms", "steps_without_graphs_ms", "floors_ms", "efficiency"):
        assert row[part].keys() == cases
        assert all(value > 0 for value in row[part].values())
    assert json.loads((tmp_path / "decode_8b.jsonl").read_text())["steps_ms"] == row["steps_ms"]
