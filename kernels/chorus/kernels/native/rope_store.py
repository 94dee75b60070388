"""`qk_norm_rope_store` and `store_kv` on a CPU: a work item is a row, all of its heads.

    queries   norm, rotate                                -> [T, H, D]
    keys      norm, rotate, 0 for what is not kept        -> their place in the pages
    values    0 for what is not kept                      -> theirs

A head's numbers are float32 between these, in registers where they fit and else in the first level of the cache; what
the norm gives is rounded, and what the rotation gives. 1024 rows of 24 heads of 64 take 0.11 ms in registers, 0.58 else
(2 cores of Zen 5). Where keys and values go is memory that nobody has seen for a while: asked for before the queries
are turned, 4 us less of a call in a decode step of 16 rows.
"""
# numba compiles what it sees, whatever the types say.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import math
from functools import cache

import numba
import numpy as np
import torch
from numba import carray
from torch import Tensor

from chorus.kernels.native.head_tile import fits, keep, turn
from chorus.kernels.native.numbers import (
    HELD_AS,
    INLINE,
    float_of,
    narrow,
    pointer,
    prefetch_to_write,
    take_ticket,
    wide,
)
from chorus.kernels.native.team import EDITION, Compiled
from chorus.kernels.reference import KV_LIMIT
from chorus.kernels.types import Norm

# The largest float32 that is kept: KV_LIMIT is none itself, and the nearest one is over it.
_LARGEST = np.nextafter(np.float32(KV_LIMIT), np.float32(0))
# A second thread for so many heads' work: 5 us, what it takes to have it.
_HEADS_OF_A_THREAD = 1536


def qk_norm_rope_store(
    query: Tensor,
    qkv: Tensor,
    caches: tuple[Tensor, Tensor],
    angles: tuple[Tensor, Tensor],
    slots: Tensor,
    *,
    norms: tuple[Norm, Norm] | None,
    interleaved: bool,
) -> None:
    """Writes the queries to `query`, [T, H, D], contiguous, keys and values to the caches [blocks, H_kv, block, D].

    qkv [T, H + 2 H_kv, D], a row's heads side by side; angles are cos and sin, [T, R / 2], of its dtype or float32.
    That all fits, and slots [T] lie in the caches, is the caller's to check: the kernel writes where they say.
    """
    rows, heads, dim = query.shape
    kv_heads = caches[0].shape[1]
    row, head, size = qkv.stride(0), dim, dim * qkv.itemsize
    key = qkv.data_ptr() + heads * size
    weights: tuple[Tensor | None, Tensor | None, float, int] = None, None, 0.0, 0
    if norms is not None:
        weights = (norms[0].weight, norms[1].weight, norms[0].eps, int(norms[0].kind == "rms_plus_one"))
    turns_halves = norms is None and not interleaved and 2 * angles[0].shape[1] == dim
    in_registers = turns_halves and _fits_registers(qkv.dtype, dim)
    kernel = _kernel_in_registers(dim) if in_registers else _kernel(HELD_AS[qkv.dtype], dim)
    kernel(
        1 + rows * (heads + 2 * kv_heads) // _HEADS_OF_A_THREAD,
        *(query, qkv, key, key + kv_heads * size, *caches, slots, *angles),
        *(rows, heads, kv_heads, caches[0].shape[2], angles[0].shape[1]),
        *(row, head, row, head, row, head, angles[0].stride(0), int(angles[0].dtype != qkv.dtype), int(interleaved)),
        *weights,
    )


def store_kv(key: Tensor, value: Tensor, caches: tuple[Tensor, Tensor], slots: Tensor) -> None:
    """Writes keys and values, [T, H_kv, D], a head's numbers side by side, to the contiguous caches; as above."""
    (rows, kv_heads, dim), block = key.shape, caches[0].shape[2]
    kernel = _kernel_in_registers(dim) if _fits_registers(key.dtype, dim) else _kernel(HELD_AS[key.dtype], dim)
    kernel(
        1 + rows * 2 * kv_heads // _HEADS_OF_A_THREAD,
        *(None, None, key, value, *caches, slots, None, None),
        *(rows, 0, kv_heads, block, 0),
        *(0, 0, key.stride(0), key.stride(1), value.stride(0), value.stride(1), 0, 0, 0),
        *(None, None, 0.0, 0),
    )


def prepare(dtype: torch.dtype, head_dim: int) -> None:
    """Compiles now what the first call would wait for."""
    if _fits_registers(dtype, head_dim):
        _kernel_in_registers(head_dim)
    _kernel(HELD_AS[dtype], head_dim)  # with norms, or another rotation


def _fits_registers(dtype: torch.dtype, dim: int) -> bool:
    return dtype == torch.bfloat16 and fits(dim)


@cache
def _kernel(held: type, dim: int) -> Compiled:
    """How many numbers a head has is a constant: 1024 rows of 24 heads of 64 take 0.72 ms so, 1.0 where loops learn
    their lengths as they begin."""
    edition, size = EDITION, np.dtype(held).itemsize
    largest = _LARGEST

    def rope_store(arguments):
        a = carray(arguments, (29,))
        out_at, query_at, key_at, value_at, k_cache, v_cache = a[2], a[3], a[4], a[5], a[6], a[7]
        slots_at, cos_at, sin_at, rows, heads, kv_heads, block = a[8], a[9], a[10], a[11], a[12], a[13], a[14]
        half, query_row, query_head, key_row, key_head = a[15], a[16], a[17], a[18], a[19]
        value_row, value_head = a[20], a[21]
        angle_row, wide_angles, interleaved, query_weight, key_weight = a[22], a[23], a[24], a[25], a[26]
        eps, plus_one = float_of(numba.uint32(a[27])), a[28]
        slots = carray(pointer(slots_at), (rows,), np.int64)
        cos, sin = np.empty(dim // 2, np.float32), np.empty(dim // 2, np.float32)
        h = np.empty(dim, np.float32)
        weight = np.empty((2, dim if query_weight else 0), np.float32)
        _widen(weight[0], carray(pointer(query_weight), (weight.shape[1],), held))
        _widen(weight[1], carray(pointer(key_weight), (weight.shape[1],), held))
        if plus_one:
            weight += np.float32(1)
        while edition == a[1]:
            row = take_ticket(arguments)
            if row >= rows:
                break
            page = slots[row] // block
            offset = slots[row] - page * block
            for head in range(kv_heads):
                at = size * ((page * kv_heads + head) * block + offset) * dim
                for j in range(0, size * dim, 64):
                    prefetch_to_write(k_cache + at + j)
                    prefetch_to_write(v_cache + at + j)
            if cos_at and wide_angles:
                _widen(cos[:half], carray(pointer(cos_at + 4 * row * angle_row), (half,), np.float32))
                _widen(sin[:half], carray(pointer(sin_at + 4 * row * angle_row), (half,), np.float32))
            elif cos_at:
                _widen(cos[:half], carray(pointer(cos_at + size * row * angle_row), (half,), held))
                _widen(sin[:half], carray(pointer(sin_at + size * row * angle_row), (half,), held))
            for head in range(heads):
                source = carray(pointer(query_at + size * (row * query_row + head * query_head)), (dim,), held)
                out = carray(pointer(out_at + size * (row * heads + head) * dim), (dim,), held)
                _turn(dim, half, out, h, source, weight[0], eps, plus_one, cos, sin, interleaved)
            for head in range(kv_heads):
                at = size * ((page * kv_heads + head) * block + offset) * dim
                source = carray(pointer(key_at + size * (row * key_row + head * key_head)), (dim,), held)
                kept = carray(pointer(k_cache + at), (dim,), held)
                if cos_at:
                    _turn(dim, half, kept, h, source, weight[1], eps, plus_one, cos, sin, interleaved)
                    _keep(dim, kept, kept, largest)
                else:
                    _keep(dim, kept, source, largest)
                source = carray(pointer(value_at + size * (row * value_row + head * value_head)), (dim,), held)
                _keep(dim, carray(pointer(v_cache + at), (dim,), held), source, largest)

    return Compiled(rope_store)


@cache
def _kernel_in_registers(dim: int) -> Compiled:
    """The same for bfloat16 where halves are rotated, whole heads of them, and nothing is normed."""
    edition, size = EDITION, 2 * dim

    def rope_store(arguments):
        a = carray(arguments, (29,))
        out_at, query_at, key_at, value_at, k_cache, v_cache = a[2], a[3], a[4], a[5], a[6], a[7]
        slots_at, cos_at, sin_at, rows, heads, kv_heads, block = a[8], a[9], a[10], a[11], a[12], a[13], a[14]
        query_row, query_head, key_row, key_head, value_row, value_head = a[16], a[17], a[18], a[19], a[20], a[21]
        angle_row, wide_angles = a[22], a[23]
        slots = carray(pointer(slots_at), (rows,), np.int64)
        angles = np.empty((2, dim // 2), np.float32)
        while edition == a[1]:
            row = take_ticket(arguments)
            if row >= rows:
                break
            cos = angles.ctypes.data  # asked for here: an array is let go after its last use
            sin, page = cos + 2 * dim, slots[row] // block
            first = size * (page * kv_heads * block + slots[row] - page * block)
            for head in range(kv_heads):
                at = first + size * head * block
                for j in range(0, size, 64):
                    prefetch_to_write(k_cache + at + j)
                    prefetch_to_write(v_cache + at + j)
            if cos_at:
                _copy_angles(dim // 2, cos, cos_at, row * angle_row, wide_angles)
                _copy_angles(dim // 2, sin, sin_at, row * angle_row, wide_angles)
            for head in range(heads):
                source = query_at + 2 * (row * query_row + head * query_head)
                turn(dim, False, out_at + size * (row * heads + head), source, cos, sin)
            for head in range(kv_heads):
                at, source = first + size * head * block, key_at + 2 * (row * key_row + head * key_head)
                if cos_at:
                    turn(dim, True, k_cache + at, source, cos, sin)
                else:
                    keep(dim, k_cache + at, source)
                keep(dim, v_cache + at, value_at + 2 * (row * value_row + head * value_head))

    return Compiled(rope_store)


@numba.njit(**INLINE)
def _copy_angles(half, into_at, at, first, are_wide):
    """A row's angles as float32; they are that, or bfloat16."""
    into = carray(pointer(into_at), (half,), np.float32)
    if are_wide:
        angles = carray(pointer(at + 4 * first), (half,), np.float32)
        for i in range(half):
            into[i] = angles[i]
    else:
        narrow_ones = carray(pointer(at + 2 * first), (half,), np.uint16)
        for i in range(half):
            into[i] = wide(narrow_ones[i])


@numba.njit(**INLINE)
def _widen(into, numbers):
    for i in range(len(into)):
        into[i] = wide(numbers[i])


@numba.njit(**INLINE)
def _turn(dim, half, out, h, source, weight, eps, plus_one, cos, sin, interleaved):
    """A head, normed where there is a weight, rotated by its row's angles."""
    for i in range(dim):
        h[i] = wide(source[i])
    if len(weight) == dim:
        _norm(dim, h, source, weight, eps, plus_one)
    if 2 * half == dim:
        _rotate(dim // 2, out, h, cos, sin, interleaved)
    else:
        _rotate(half, out, h, cos, sin, interleaved)
    for i in range(2 * half, dim):
        out[i] = narrow(h[i], out[i])


@numba.njit(**INLINE)
def _rotate(half, out, h, cos, sin, interleaved):
    if interleaved:
        for i in range(half):
            first, second = h[2 * i], h[2 * i + 1]
            out[2 * i] = narrow(first * cos[i] - second * sin[i], out[2 * i])
            out[2 * i + 1] = narrow(second * cos[i] + first * sin[i], out[2 * i])
    else:
        for i in range(half):
            first, second = h[i], h[half + i]
            out[i] = narrow(first * cos[i] - second * sin[i], out[i])
            out[half + i] = narrow(second * cos[i] + first * sin[i], out[i])


@numba.njit(**INLINE)
def _norm(dim, h, like, weight, eps, plus_one):
    """RMSNorm, rounded as transformers does: Llama's before and after its weight, the other once."""
    total = np.float32(0)
    for i in range(dim):
        total += h[i] * h[i]
    scale = np.float32(1) / np.float32(math.sqrt(total / np.float32(dim) + eps))
    if plus_one:
        for i in range(dim):
            h[i] = wide(narrow(h[i] * scale * weight[i], like[i]))
    else:
        for i in range(dim):
            h[i] = wide(narrow(wide(narrow(h[i] * scale, like[i])) * weight[i], like[i]))


@numba.njit(**INLINE)
def _keep(dim, kept, numbers, largest):
    """`numbers`, 0 in the place of NaN and of what is larger than `largest`."""
    for i in range(dim):
        number = wide(numbers[i])
        kept[i] = narrow(number if abs(number) <= largest else np.float32(0), numbers[i])
