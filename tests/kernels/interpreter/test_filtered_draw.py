"""filtered_draw on Triton, in the interpreter, against its definition in exact arithmetic and its specification."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from chorus.kernels import filtered_draw, filtered_draw_launch
from chorus.kernels.filtered_draw_launch import filtered_draw_op
from support.filtered_draw import LAST, NOISE, ROWS, TOP_P, arguments, expected, many

CASES = st.tuples(ROWS, st.tuples(st.integers(0, 14), TOP_P, NOISE))


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """So that short rows are several turns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filtered_draw_launch, "GATHER_BLOCK", 8)
        patch.setattr(filtered_draw_launch, "DRAW_BLOCK", 4)
        yield


@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # to shrink takes long
@example([([2.0**-25, *[1.0] * 11], (12, 1.0, LAST)), ([2.0**-25, *[1.0] * 11], (0, 1 - 2.0**-10, LAST))])
@example([([1.0, 0.5, 1.0, 0.5, 1.0], (0, 1.0, 0.75)), ([0.5, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5], (6, 0.75, 0.75))])
@given(st.lists(CASES, min_size=4, max_size=4))
def test_draws_are_those_of_exact_arithmetic(rows: list[tuple[list[float], tuple[int, float, float]]]) -> None:
    given_rows = arguments([row for row, _ in rows], [filters for _, filters in rows])
    assert filtered_draw(*given_rows, triton=True).tolist() == expected(*given_rows)


def test_rows_of_any_sharpness_draw_what_the_specification_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filtered_draw_launch, "GATHER_BLOCK", 512)
    monkeypatch.setattr(filtered_draw_launch, "DRAW_BLOCK", 256)
    given_rows = many(1500, seed=1)
    tokens = filtered_draw(*given_rows, triton=True)
    assert torch.equal(tokens, filtered_draw(*given_rows))
    assert len(set(tokens.tolist())) > 15


def test_the_op_is_what_torch_expects_of_ops() -> None:
    torch.library.opcheck(filtered_draw_op, arguments([[1.0, 0.5], [0.25, 1.0]], [(1, 0.5, 0.5), (0, 0.5, 0.5)]))
