"""A tiny run of the churn benchmark against a live server."""

import asyncio
from argparse import Namespace
from pathlib import Path

import pytest

import churn
from common import Others


def test_adapters_come_and_go_while_streams_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(churn, "TOKENS", 60)
    monkeypatch.setattr(Others, "refuse", Others.cores)
    row = asyncio.run(churn.run(Namespace(rounds=1, streams=2, per_second=20.0), tmp_path))
    assert row["loads"]["visit"] == {"host": 0, "disk": 0}
    assert row["loads"]["host"]["host"] > row["loads"]["host"]["disk"] == 0
    assert row["loads"]["disk"]["disk"] > row["loads"]["disk"]["host"] == 0
    assert 0 < row["quiet_p50_ms"] <= row["quiet_p99_ms"]
    assert row["disk_p99_ratio"] == pytest.approx(row["disk_p99_ms"] / row["quiet_p99_ms"])
