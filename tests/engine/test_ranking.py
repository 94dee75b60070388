"""The likeliest tokens come in one order: by value, then by id."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chorus.engine.ranking import keys, top

VALUES = st.lists(st.sampled_from([-math.inf, -2.0, -0.0, 0.0, 1.0, 1.5, 3e38]), min_size=1, max_size=12)


def ranked(row: list[float]) -> list[int]:
    return sorted(range(len(row)), key=lambda token: (-row[token], token))


@given(st.lists(VALUES, min_size=1, max_size=5), st.integers(1, 12))
def test_largest_first_and_of_equals_the_smaller_id(rows: list[list[float]], k: int) -> None:
    width = max(map(len, rows))
    padded = [row + [-math.inf] * (width - len(row)) for row in rows]
    k = min(k, width)
    assert top(torch.tensor(padded), k).tolist() == [ranked(row)[:k] for row in padded]


@pytest.mark.parametrize("k", [1, 5, 300, 3000])
def test_bf16_rows_full_of_equals(k: int) -> None:
    values = torch.randn(6, 3000, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    assert top(values, k).tolist() == [ranked(row)[:k] for row in values.tolist()]


@given(st.lists(VALUES, min_size=1, max_size=3))
def test_keys_of_a_device_are_in_the_same_order(rows: list[list[float]]) -> None:
    width = max(map(len, rows))
    padded = [row + [-math.inf] * (width - len(row)) for row in rows]
    order = keys(torch.tensor(padded)).sort(dim=-1, descending=True).indices
    assert order.tolist() == [ranked(row) for row in padded]


def test_values_that_need_no_order_come_last() -> None:
    values = torch.tensor([[0.0, 0.5, 0.0, 0.7, 0.0, 0.0]])
    ids = top(values, 4, above=0.0)[0].tolist()
    assert ids[:2] == [3, 1]
    assert set(ids[2:]) < {0, 2, 4, 5}
