"""Up to 32 rows of x times 32 columns of a packed weight, on a CPU with AMX: the innermost loop of a linear, in tiles.

    for each 16 pairs of K            w: 2 tiles, of 16 pairs and 16 columns each
        for each 16 rows              x: a tile of 16 rows and 16 pairs, where they lie
            sums += x w               `tdpbf16ps`: 16 rows and 16 columns of float32

A tile is 16 rows of 64 bytes. There are eight, four for sums, two for x and two for w, and `_configure` says how much
of each is there, so that no row past the last and no pair past the last is read. Linux gives them to who asks.
"""
# numba compiles what it sees, whatever the types say.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import ctypes
import sys
from functools import cache
from itertools import product
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from chorus.kernels.native.numbers import OPTIONS, ask_for
from chorus.kernels.native.vectors import INT64, at_most, cpu_has

ROWS, COLUMNS = 32, 32
PANEL = 32
"""Columns that lie beside each other in the packed weight."""
BLOCK = 512
"""Pairs of K that are best multiplied at a time: 64 KiB of weights."""

_SIDE = 16  # rows of a tile, columns of sums, pairs of K
_ROW_OF_SUMS, _PAIR_OF_WEIGHTS = 4 * PANEL, 4 * PANEL  # bytes
_X, _W = 4, 6  # the first tile of x, of w; before them are the sums'
_BYTE, _NOTHING = ir.IntType(8), ir.VoidType()
_ADDRESS = _BYTE.as_pointer()


@cache
def cpu_has_tiles() -> bool:
    """Whether numba compiles for a CPU with AMX, and Linux lets this process use it."""
    return cpu_has("amx-bf16") and sys.platform == "linux" and _permitted()


def _permitted() -> bool:
    """Asks for the tiles' state to be kept for this process's threads: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA)."""
    arch_prctl, ask_permission, tile_data = 158, 0x1023, 18
    return bool(ctypes.CDLL(None).syscall(arch_prctl, ask_permission, tile_data) == 0)


@numba.njit(**OPTIONS)
def tile(x_at, x_stride, last, w_at, pairs, sums_at, ahead_at, ahead):
    """sums [32, 32] += x [32, 2 pairs] times w [pairs, 32, 2]; addresses and x's stride in bytes, all int64.

    Rows past number `last` are neither read nor written. Meanwhile `ahead` bytes for each pair are asked for from
    `ahead_at` on.
    """
    rows, steps, rest = min(last + 1, ROWS), pairs // _SIDE, pairs % _SIDE
    if steps:
        _configure(rows, _SIDE)
        if rows > _SIDE:
            _products(2, x_at, x_stride, w_at, steps, sums_at, ahead_at, ahead)
        else:
            _products(1, x_at, x_stride, w_at, steps, sums_at, ahead_at, ahead)
    if rest:
        done, ahead_at = 4 * _SIDE * steps, ahead_at + _SIDE * steps * ahead
        _configure(rows, rest)
        if rows > _SIDE:
            _products(2, x_at + done, x_stride, w_at + PANEL * done, 1, sums_at, ahead_at, ahead)
        else:
            _products(1, x_at + done, x_stride, w_at + PANEL * done, 1, sums_at, ahead_at, ahead)
    _release()


@intrinsic
def _configure(typing: Any, rows: Any, pairs: Any) -> Any:
    """Tiles for sums [rows, 32], x [rows, pairs, 2] and w [pairs, 32, 2], of up to 32 rows and 16 pairs."""
    return types.void(types.int64, types.int64), _build_configure


def _build_configure(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    rows, pairs = arguments
    upper = at_most(builder, _SIDE, rows)
    left = builder.sub(rows, upper)
    lower = builder.select(builder.icmp_signed(">", left, INT64(0)), left, INT64(1))  # a tile without rows is refused
    wide = builder.mul(pairs, INT64(4))
    # 64 bytes: the palette; from 16 on each tile's bytes in a row, two bytes a number; from 48 on its rows, one byte.
    sums_widths = _side_by_side(builder, 16, [INT64(64)] * 4)
    other_widths = _side_by_side(builder, 16, [wide, wide, INT64(64), INT64(64)])
    heights = _side_by_side(builder, 8, [upper, upper, lower, lower, upper, lower, pairs, pairs])
    words = [INT64(1), INT64(0), sums_widths, other_widths, INT64(0), INT64(0), heights, INT64(0)]
    at = builder.ptrtoint(cgutils.alloca_once(builder, ir.ArrayType(INT64, len(words))), INT64)
    for number, word in enumerate(words):
        place = builder.add(at, INT64(8 * number))
        builder.store(word, builder.inttoptr(place, INT64.as_pointer()))
    _call(builder, "ldtilecfg", builder.inttoptr(at, _ADDRESS))
    return context.get_dummy_value()


def _side_by_side(builder: Any, bits: int, numbers: list[Any]) -> Any:
    """Numbers of so many bits in one of 64, the first one lowest."""
    word = INT64(0)
    for place, number in enumerate(numbers):
        word = builder.or_(word, builder.shl(number, INT64(bits * place)))
    return word


@intrinsic
def _release(typing: Any) -> Any:
    """Gives the tiles back: a thread that holds some takes longer to be switched."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), build


@intrinsic(prefer_literal=True)
def _products(
    typing: Any,
    row_tiles: Any,
    x_at: Any,
    x_stride: Any,
    w_at: Any,
    steps: Any,
    sums_at: Any,
    ahead_at: Any,
    ahead: Any,
) -> Any:
    """`tile` of one or two tiles of rows, `row_tiles`, a constant, and so many times the pairs of a tile."""
    above = range(row_tiles.literal_value)
    places = list(product(above, range(COLUMNS // _SIDE)))

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, x_at, x_stride, w_at, steps, sums_at, ahead_at, ahead = arguments
        rows = [builder.add(x_at, builder.mul(x_stride, INT64(_SIDE * row))) for row in above]
        kept = {(row, v): builder.add(sums_at, INT64(_SIDE * (_ROW_OF_SUMS * row + 4 * v))) for row, v in places}
        for (row, v), at in kept.items():
            _load(builder, 2 * row + v, at, INT64(_ROW_OF_SUMS))
        with cgutils.for_range(builder, steps) as loop:
            for row in above:
                x = builder.add(rows[row], builder.mul(INT64(4 * _SIDE), loop.index))
                _load(builder, _X + row, x, x_stride)
            w = builder.add(w_at, builder.mul(INT64(_PAIR_OF_WEIGHTS * _SIDE), loop.index))
            for v in range(COLUMNS // _SIDE):
                _load(builder, _W + v, builder.add(w, INT64(4 * _SIDE * v)), INT64(_PAIR_OF_WEIGHTS))
                for row in above:
                    _call(builder, "tdpbf16ps", _BYTE(2 * row + v), _BYTE(_X + row), _BYTE(_W + v))
            asked = builder.add(ahead_at, builder.mul(builder.mul(INT64(_SIDE), ahead), loop.index))
            with cgutils.for_range(builder, builder.lshr(ahead, INT64(2))) as line:
                ask_for(builder, builder.add(asked, builder.mul(INT64(64), line.index)))
        for (row, v), at in kept.items():
            _call(builder, "tilestored64", _BYTE(2 * row + v), builder.inttoptr(at, _ADDRESS), INT64(_ROW_OF_SUMS))
        return context.get_dummy_value()

    return types.void(row_tiles, *[types.int64] * 7), build


def _load(builder: Any, tile: int, at: Any, stride: Any) -> None:
    _call(builder, "tileloadd64", _BYTE(tile), builder.inttoptr(at, _ADDRESS), stride)


def _call(builder: Any, instruction: str, *operands: Any) -> None:
    kind = ir.FunctionType(_NOTHING, [operand.type for operand in operands])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{instruction}")
    builder.call(function, operands)
