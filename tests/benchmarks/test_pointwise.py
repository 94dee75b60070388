"""The benchmark of what lies between the linears in small, on a CPU: its GPU's cases beside its CPU's."""

import pytest
import torch

import pointwise
from pointwise import HEADS, SHAPES, Shape


def test_cases_of_several_numbers_of_rows_have_them_in_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise, "ROUNDS", 1)
    monkeypatch.setattr(pointwise, "CALLS", 1)
    monkeypatch.setattr(pointwise, "copy_bandwidth", lambda device: 1e10)
    monkeypatch.setitem(SHAPES, "cpu", [Shape(rows, 32, 48, 4, 2, 16) for rows in (3, 70)])
    monkeypatch.setitem(HEADS, "cpu", [heads._replace(adapters=3) for heads in HEADS["cuda"]])
    with torch.inference_mode():
        row = pointwise.measure("cpu")
    found = set(row["us"])
    for name in ("residual_norm rms", "silu_mul", "qk_norm_rope_store", "row_scale"):
        assert {f"{name}, 3 rows", f"{name}, 70 rows"} <= found
    assert {heads.name for heads in HEADS["cuda"]} <= found
    assert all(us["chorus"] > 0 and us["floor"] > 0 for us in row["us"].values())
    assert "loop over adapters" in row["us"]["row_scale, 3 rows"]
    assert "loop over adapters" not in row["us"]["row_scale, 70 rows"]
