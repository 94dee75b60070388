"""A share of the weight falls on the token that a plain cumulative sum in float64 gives."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chorus.engine import inversion
from chorus.engine.inversion import invert

LAST = math.nextafter(1.0, 0.0)


def plainly(weights: np.ndarray, noise: np.ndarray) -> list[int]:
    cumulative = weights.astype(np.float64).cumsum(axis=1)
    return [
        int(np.searchsorted(row, share * row[-1], side="right")) for row, share in zip(cumulative, noise, strict=True)
    ]


@pytest.mark.parametrize("width", [1, 511, 512, 513, 1024, 3000])
def test_places_are_those_of_one_long_cumulative_sum(width: int) -> None:
    generator = np.random.default_rng(width)
    # Whole numbers, so that every sum is exact; noise in the middle of what one unit of weight takes.
    weights = generator.integers(0, 5, (200, width)).astype(np.float32)
    weights[:, generator.integers(width)] = 7
    total = weights.sum(axis=1)
    noise = (np.floor(generator.random(200) * total) + 0.5) / total
    assert invert(torch.from_numpy(weights), torch.from_numpy(noise.astype(np.float64))).tolist() == plainly(
        weights, noise
    )


@given(
    row=st.lists(st.sampled_from([0.0, 1e-38, 1e-9, 1.0]), min_size=1, max_size=9),
    noise=st.sampled_from([0.0, 5e-324, 0.3, 0.5, LAST]),
    block=st.integers(1, 10),
)
def test_a_place_without_weight_is_never_hit(row: list[float], noise: float, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inversion, "BLOCK", block)
        (place,) = invert(torch.tensor([row]), torch.tensor([noise], dtype=torch.float64)).tolist()
    assert row[place] > 0 if any(row) else place == -1


@pytest.mark.parametrize("row", [[0.0, 0.0], [math.nan, 1.0], [1.0, math.nan]])
def test_a_row_without_weight_or_with_nan_has_no_place_and_others_have(row: list[float]) -> None:
    weights = torch.tensor([row, [0.0, 1.0]])
    assert invert(weights, torch.tensor([0.5, 0.0], dtype=torch.float64)).tolist() == [-1, 1]
