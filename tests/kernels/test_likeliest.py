"""likeliest on a CPU, against Python's own max, number by number; what it refuses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chorus.kernels import likeliest, reference
from support.rows import DTYPES, noise

# 512 numbers are looked through together, 32 or 16 at a time.
WIDTHS = [1, 2, 15, 17, 100, 511, 512, 513, 1024, 3001]
NUMBERS = st.sampled_from([-math.inf, -3.0, -1.0, -0.0, 0.0, 1e-7, 1.0, 3.0, math.inf, math.nan, -math.nan])


def definition(logits: torch.Tensor) -> list[int]:
    """The first of the largest, or -1."""
    rows = logits.double().tolist()
    return [row.index(max(row)) if not any(map(math.isnan, row)) and math.isfinite(max(row)) else -1 for row in rows]


@settings(deadline=None)
@given(rows=st.integers(1, 6), dtype=st.sampled_from(DTYPES), width=st.sampled_from(WIDTHS), seed=st.integers(0, 99))
def test_it_is_the_first_of_the_largest(rows: int, dtype: torch.dtype, width: int, seed: int) -> None:
    logits = (noise(seed, rows, width) * 4).to(dtype)  # in two bytes the largest often has equals
    expected = definition(logits)
    assert likeliest(logits).tolist() == expected
    assert reference.likeliest(logits).tolist() == expected


@settings(deadline=None)
@given(
    numbers=st.lists(NUMBERS, min_size=1, max_size=5),
    dtype=st.sampled_from(DTYPES),
    before=st.sampled_from([0, 1, 31, 511, 600]),
    after=st.sampled_from([0, 1, 530]),
)
def test_equals_zeros_infinities_and_nan_wherever_they_lie(
    numbers: list[float], dtype: torch.dtype, before: int, after: int
) -> None:
    logits = torch.full((3, before + len(numbers) + after), -2.0).to(dtype)
    logits[1, before : before + len(numbers)] = torch.tensor(numbers).to(dtype)
    expected = definition(logits)
    assert likeliest(logits).tolist() == expected
    assert reference.likeliest(logits).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_two_bytes_is_in_its_place(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    pairs = torch.stack([every[:-1], every[1:]], dim=-1)
    for logits in (every[:, None], pairs, pairs.flip(1), torch.stack([every, -every], dim=-1)):
        assert likeliest(logits).tolist() == definition(logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("negative", [False, True])
def test_the_nan_whose_bits_are_all_set_is_seen(negative: bool, dtype: torch.dtype) -> None:
    bits = torch.int16 if dtype.itemsize == 2 else torch.int32
    logits = torch.zeros(2, 700, dtype=dtype)
    logits.view(bits)[1, 650] = -1 if negative else torch.iinfo(bits).max
    assert likeliest(logits).tolist() == [0, -1]


def test_rows_that_nothing_can_be_taken_from() -> None:
    inf = math.inf
    logits = torch.tensor([[-inf, -inf], [1.0, inf], [-inf, 2.0]])
    assert likeliest(logits).tolist() == [-1, -1, 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_lie_apart(dtype: torch.dtype) -> None:
    wide = noise(0, 5, 90).to(dtype)
    wide[:, 60:] = 99
    assert likeliest(wide[:, 3:60]).tolist() == definition(wide[:, 3:60])
    assert likeliest(wide[::2]).tolist() == definition(wide[::2])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads: int) -> None:
    logits, before = noise(0, 40, 9001).bfloat16(), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert likeliest(logits).tolist() == definition(logits)
    finally:
        torch.set_num_threads(before)


def test_no_rows_have_no_tokens() -> None:
    assert likeliest(torch.empty(0, 7)).shape == (0,)


def test_other_numbers_and_devices_have_it_too() -> None:
    assert likeliest(torch.tensor([[1.0, 3.0, 3.0]], dtype=torch.float64)).tolist() == [1]
    assert likeliest(torch.empty(4, 9, device="meta")).shape == (4,)


@pytest.mark.parametrize("logits", [torch.zeros(3), torch.zeros(2, 0), torch.zeros(2, 3, dtype=torch.int64)])
def test_what_is_no_row_of_numbers_is_refused(logits: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="logits: want floating point"):
        likeliest(logits)


def test_numbers_that_lie_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="logits: rows must be contiguous"):
        likeliest(torch.zeros(4, 3).T)
