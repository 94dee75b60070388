"""A tiny run of the serving benchmark against a live server, with everything it can be told."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

import serving
from chorus.models.checkpoint import base_folder
from loads.live_server import live_server

FLAGS = (
    "--adapters 0 1 3 --rates 20 --duration 0.5 --alpha 0.6 --cv 2 --input 8 16 --output 4 8 --ranks 4 8 "
    "--device cpu --adapter-memory-mb 64 --threads 1 --json"
)


def test_a_tiny_run_tells_every_figure_for_each_number_of_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["serving.py", *FLAGS.split()])
    arguments = serving.parse()
    config = json.loads((base_folder(None) / "config.json").read_text())
    with live_server(tmp_path / "state", *serving.server_options(arguments)) as server:
        asyncio.run(serving.push(server, config, tmp_path / "adapters", 3, arguments.ranks))
        tiers, *runs = asyncio.run(serving.measure(server, arguments, config["vocab_size"]))
    assert {"first_token_cold_ms", "first_token_warm_ms", "first_token_hot_ms", "first_token_base_ms"} <= set(tiers)
    assert [(run["adapters"], run["requests"], run["completed"]) for run in runs] == [(n, 10, 10) for n in (0, 1, 3)]
    assert all(set(serving.COLUMNS) <= set(run) and run["attainment"] == 1.0 for run in runs)
    assert set(serving.tax(runs)) == {"requests_s_1_over_0", "requests_s_3_over_0"}
    assert "ftl mean" in capfd.readouterr().err
