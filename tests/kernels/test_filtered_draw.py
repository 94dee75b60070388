"""filtered_draw's specification is its definition in exact arithmetic; what does not fit is refused by name."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chorus.kernels import filtered_draw
from support.filtered_draw import NOISE, ROWS, TOP_P, arguments, expected


@given(st.lists(st.tuples(ROWS, st.tuples(st.integers(0, 14), TOP_P, NOISE)), min_size=1, max_size=4))
def test_the_specification_draws_what_exact_arithmetic_draws(
    rows: list[tuple[list[float], tuple[int, float, float]]],
) -> None:
    given_rows = arguments([row for row, _ in rows], [filters for _, filters in rows])
    assert filtered_draw(*given_rows).tolist() == expected(*given_rows)


def test_a_row_without_mass_or_with_nan_has_no_token_and_others_have() -> None:
    given_rows = arguments([[0.0, 0.0], [torch.nan, 1.0], [0.25, 1.0]], [(1, 1.0, 0.0), (0, 0.5, 0.0), (0, 0.5, 0.0)])
    assert filtered_draw(*given_rows).tolist() == [-1, -1, 1]


WEIGHTS = torch.ones(2, 3)
GOOD: dict[str, Any] = {
    "weights": WEIGHTS,
    "totals": WEIGHTS.sum(dim=-1),
    "top_k": torch.zeros(2, dtype=torch.int64),
    "top_p": torch.ones(2, dtype=torch.float64),
    "noise": torch.zeros(2, dtype=torch.float64),
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weights", WEIGHTS.double()),
        ("weights", WEIGHTS[0]),
        ("weights", torch.ones(3, 2).T),
        ("totals", torch.ones(3)),
        ("top_k", torch.ones(2)),
        ("top_p", torch.ones(2)),
        ("noise", torch.ones(2, 1, dtype=torch.float64)),
    ],
)
def test_what_does_not_fit_is_refused_by_name(name: str, value: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=f"^{name}: want"):
        filtered_draw(**GOOD | {name: value})
