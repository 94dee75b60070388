"""What all compiled CPU kernels stand on: numbers as torch has them, threads that change nothing."""

import importlib
import logging
import math
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
import torch

from chorus.kernels import AttentionPlan, AttentionRow, paged_attention
from chorus.kernels.dispatch import NATIVE_DTYPES
from chorus.kernels.native import rank_tiles, team
from chorus.kernels.native.numbers import HELD_AS, OPTIONS, exp, narrow, wide


def test_without_numba_there_is_all_but_a_cpus_kernels() -> None:
    program = (
        "import sys; sys.modules['numba'] = None; import chorus.kernels, chorus.engine.engine, chorus.trainer.command"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_dispatch_knows_the_dtypes_that_kernels_are_made_for() -> None:
    assert set(HELD_AS) == NATIVE_DTYPES


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def widened(numbers: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(numbers)):
        out[i] = wide(numbers[i])


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def narrowed(values: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(values)):
        out[i] = narrow(values[i], out[i])


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def powers(x: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(x)):
        out[i] = exp(x[i])


def held(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's memory as kernels see it."""
    kind = HELD_AS[tensor.dtype]
    return (tensor.view(torch.int16) if kind is not np.float32 else tensor).numpy().view(kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_two_bytes_is_widened_as_torch_does(dtype: torch.dtype) -> None:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    out = torch.empty(len(numbers))
    widened(held(numbers), out.numpy())
    torch.testing.assert_close(out, numbers.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_numbers_are_rounded_as_torch_does(dtype: torch.dtype) -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (1 << 18,), generator=torch.Generator().manual_seed(0))
    ties = torch.arange(0x3F800000, 0x3F900000, 0x800)  # half way between neighbours, and beside it
    values = torch.cat([bits, ties, ties + 1, ties - 1]).to(torch.int32).view(torch.float32)
    out = torch.empty(len(values), dtype=dtype)
    narrowed(values.numpy(), held(out))
    torch.testing.assert_close(out, values.to(dtype), rtol=0, atol=0, equal_nan=True)


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def row_widened(numbers: np.ndarray, sums: np.ndarray) -> None:
    rank_tiles.widen_row(sums.ctypes.data, numbers.ctypes.data, len(sums) // rank_tiles.ROW_COLUMNS)


@numba.njit(**OPTIONS)  # type: ignore[untyped-decorator]
def row_narrowed(sums: np.ndarray, out: np.ndarray) -> None:
    rank_tiles.narrow_row(sums.ctypes.data, out.ctypes.data, len(sums) // rank_tiles.ROW_COLUMNS)


def test_vectors_widen_and_round_as_torch_does() -> None:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    numbers = numbers[numbers.isnan() | (numbers == 0) | (numbers.abs() >= 2.0**-126)]  # the rest may become 0
    numbers = numbers[: len(numbers) // rank_tiles.ROW_COLUMNS * rank_tiles.ROW_COLUMNS].contiguous()
    sums, out = torch.empty(len(numbers)), torch.empty_like(numbers)
    row_widened(held(numbers), sums.numpy())
    assert torch.equal(sums.sort().values.nan_to_num(7), numbers.float().sort().values.nan_to_num(7))
    row_narrowed(sums.numpy(), held(out))
    torch.testing.assert_close(out, numbers, rtol=0, atol=0, equal_nan=True)
    shift = torch.randint(-0x8000, 0x8001, (len(numbers),), generator=torch.Generator().manual_seed(0))
    between = (sums.view(torch.int32) + shift.to(torch.int32)).view(torch.float32)  # ties among them
    between[:64] = sums[:64] * (1 + 2.0**-8)
    between = torch.where(between.abs() >= 2.0**-126, between, 1.0)
    row_narrowed(between.numpy(), held(out))
    # In the order of sums: what it is, the numbers themselves tell.
    row_widened(held(out), sums.numpy())
    torch.testing.assert_close(sums, between.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


def test_exp_is_within_two_units_of_the_last_place() -> None:
    x = np.concatenate([np.linspace(-87.2, 88.2, 1 << 18), np.linspace(-1, 1, 1 << 16)]).astype(np.float32)
    out = np.empty_like(x)
    powers(x, out)
    exact = np.exp(x.astype(np.float64))
    assert float((np.abs(out - exact) / np.spacing(exact.astype(np.float32))).max()) <= 2


def test_exp_ends_where_float32_does_and_keeps_nan() -> None:
    out = np.empty(5, np.float32)
    powers(np.array([-math.inf, -1000, math.inf, 1000, math.nan], np.float32), out)
    assert all(out[:2] > 0)
    assert all(out[:2] < 1.3e-38)
    assert all(out[2:4] > 2e38)
    assert math.isnan(out[4])


def test_threads_change_no_bit() -> None:
    torch.manual_seed(0)
    contexts = [1, 16, 31, 200, 77]
    tables = [list(range(13 * i, 13 * i + 13)) for i in range(5)]
    rows = [
        AttentionRow(i, i + 1, context, table) for i, (context, table) in enumerate(zip(contexts, tables, strict=True))
    ]
    keys, values = (torch.randn(65, 2, 16, 32, dtype=torch.bfloat16) for _ in range(2))
    query = torch.randn(5, 8, 32, dtype=torch.bfloat16)
    plan = AttentionPlan(rows, 16, torch.device("cpu"))
    threads = torch.get_num_threads()
    try:
        outputs = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outputs += [paged_attention(query, keys, values, plan, scale=0.2) for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_kernels_of_other_constants_share_no_file_of_the_kept_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "adds.py").write_text(
        "def adds(n):\n    def kernel(arguments):\n        arguments[2] += n\n    return kernel\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    adds = importlib.import_module("adds").adds
    for n in (3, 4, 3):
        assert team.Compiled(adds(n)) is not None
    # An index each: two processes that write at the same time can not mistake one for the other.
    assert len(list(tmp_path.rglob("*.nbi"))) == len(list(tmp_path.rglob("*.nbc"))) == 2


def test_where_code_can_not_be_kept_it_is_compiled_and_said(caplog: pytest.LogCaptureFixture) -> None:
    scope: dict[str, team.Kernel] = {}
    exec("def kernel(arguments):\n    arguments[2] += 1", scope)  # of no file, so numba finds no folder for it
    memory = torch.zeros(1, dtype=torch.int64)
    with caplog.at_level(logging.WARNING):
        kernel = team.Compiled(scope["kernel"])
    kernel(1, memory)
    assert "every start compiles them anew" in caplog.text
