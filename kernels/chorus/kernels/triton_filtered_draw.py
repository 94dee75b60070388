"""The Triton kernels of `filtered_draw`: a row's likeliest tokens side by side, then the draw among them.

Which tokens the filters keep, and which one is drawn, are three questions of one form: the smallest weight such that so
much lies above it. Each is answered by bisection over the bits of a weight, whose order is that of the numbers, so in
at most 30 looks, without sorting anything. Counts and float64 masses are summed in one order, so equal rows give equal
tokens; rounding is monotonic, so bisection finds what a scan would.

    weights    0.02 1.0 0.6 0.001 0.6 0.3 ...        V of them; few are over 2^-8 of the likeliest
    gathered   1.0 0.6 0.6 0.3                       in the order of their ids, so that equal ones keep it
"""
# Triton's language is not typed: annotations inside kernels name constants, no more.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, type-arg, valid-type"

import triton
import triton.language as tl


@triton.jit
def _above(weights_ptr, count, key, BLOCK: tl.constexpr):
    """How many of `count` weights have bits over `key`, and their mass in float64."""
    many = tl.zeros([BLOCK], dtype=tl.int32)
    mass = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)  # [BLOCK]
        weight = tl.load(weights_ptr + at, mask=at < count, other=0.0)
        above = weight.to(tl.int32, bitcast=True) > key
        many += above.to(tl.int32)
        mass += tl.where(above, weight, 0.0).to(tl.float64)
    return tl.sum(many, axis=0), tl.sum(mass, axis=0)


@triton.jit
def _value(key):
    """The weight with these bits."""
    return key.to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit(do_not_specialize=["V"])
def gather_likeliest(
    weights_ptr, totals_ptr, top_k_ptr, top_p_ptr, gathered_ptr, ids_ptr, found_ptr, V,
    START: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Puts a row's weights above a bound side by side, all that its filters keep among them, and their ids.

    The bound is 2^-8, then less until it is low enough, 0 at the last. `found` [R, 2] gets how many, and the bound's
    bits. Grid (R).
    """
    row = tl.program_id(0).to(tl.int64)
    top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    limited = (top_k > 0) & (top_k < V)
    most = tl.where(limited, top_k, V + 1)
    wanted = tl.where(limited | (top_p >= 1), float("inf"), tl.load(totals_ptr + row).to(tl.float64) * top_p)
    key = tl.full([], START, dtype=tl.int32)
    count, mass = _above(weights_ptr + row * V, V, key, BLOCK)
    while (key > 0) & (count < most) & (mass < wanted):
        key = tl.maximum(key - STEP, 0)
        count, mass = _above(weights_ptr + row * V, V, key, BLOCK)
    gathered = tl.full([], 0, dtype=tl.int32)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)  # [BLOCK]
        weight = tl.load(weights_ptr + row * V + at, mask=at < V, other=0.0)
        above = weight.to(tl.int32, bitcast=True) > key
        to = row * V + gathered + tl.cumsum(above.to(tl.int32), axis=0) - 1
        tl.store(gathered_ptr + to, weight, mask=above)
        tl.store(ids_ptr + to, at, mask=above)
        gathered += tl.sum(above.to(tl.int32), axis=0)
    tl.store(found_ptr + row * 2, gathered)
    tl.store(found_ptr + row * 2 + 1, key)


@triton.jit
def _next(mass):
    """The smallest float64 over a mass."""
    return (mass.to(tl.int64, bitcast=True) + 1).to(tl.float64, bitcast=True)


@triton.jit
def _first(weights_ptr, count, below, most, bound, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    """The smallest key over `below` above which are fewer than `most` weights, of less mass than `bound`.

    Also how many are above it, their mass, and how many weights have its bits. None is over LARGEST.
    """
    high = tl.full([], LARGEST, dtype=tl.int32)
    many = tl.full([], 0, dtype=tl.int32)
    mass = tl.full([], 0.0, dtype=tl.float64)
    low = below
    many_from, _ = _above(weights_ptr, count, low, BLOCK)
    while high - low > 1:
        middle = low + (high - low) // 2
        many_there, mass_there = _above(weights_ptr, count, middle, BLOCK)
        fits = (many_there < most) & (mass_there < bound)
        many_from = tl.where(fits, many_from, many_there)
        low = tl.where(fits, low, middle)
        many = tl.where(fits, many_there, many)
        mass = tl.where(fits, mass_there, mass)
        high = tl.where(fits, middle, high)
    return high, many, mass, many_from - many


@triton.jit(do_not_specialize=["V"])
def draw_likeliest(
    gathered_ptr, ids_ptr, found_ptr, totals_ptr, top_k_ptr, top_p_ptr, noise_ptr, out_ptr, V,
    LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[r] = the token of row r that its noise falls on; -1 for a row without mass, or with NaN. Grid (R).

    Kept are all weights over `cut`, and the first `equal` that are equal to it.
    """
    row = tl.program_id(0).to(tl.int64)
    total = tl.load(totals_ptr + row).to(tl.float64)
    if not total > 0:
        tl.store(out_ptr + row, tl.full([], -1, dtype=tl.int64))
        return
    weights_ptr, ids_ptr = gathered_ptr + row * V, ids_ptr + row * V
    count, bound = tl.load(found_ptr + row * 2), tl.load(found_ptr + row * 2 + 1)
    top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    cut = bound + 1
    equal = V.to(tl.int64)
    mass = total
    limited = (top_k > 0) & (top_k < V)
    if limited:
        cut, many, over, there = _first(weights_ptr, count, bound, top_k, float("inf"), LARGEST, BLOCK)
        equal = tl.minimum(top_k - many, there.to(tl.int64))
        mass = over + equal.to(tl.float64) * _value(cut)
    if top_p < 1:
        wanted = mass * top_p
        last = cut
        cut, many, over, there = _first(weights_ptr, count, last - 1, V + 1, wanted, LARGEST, BLOCK)
        there = tl.where(cut == last, tl.minimum(equal, there.to(tl.int64)), there.to(tl.int64))
        equal = tl.minimum(tl.ceil((wanted - over) / _value(cut)), there.to(tl.float64)).to(tl.int64)
        mass = over + equal.to(tl.float64) * _value(cut)
    if (top_p >= 1) & (limited == 0):
        _, mass = _above(weights_ptr, count, bound, BLOCK)  # all that there is: totals are rounded
    # Below the mass, however it is rounded: noise is 1 - 2^-53 at most. What is over the drawn weight may be as much.
    target = tl.load(noise_ptr + row) * mass
    key, many, over, there = _first(weights_ptr, count, cut - 1, V + 1, _next(target), LARGEST, BLOCK)
    last_equal = tl.where(key == cut, equal, there.to(tl.int64)) - 1
    place = tl.minimum(tl.floor((target - over) / _value(key)), last_equal.to(tl.float64)).to(tl.int32)
    token = tl.full([], 0, dtype=tl.int32)
    seen = tl.full([], 0, dtype=tl.int32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)  # [BLOCK]
        weight = tl.load(weights_ptr + at, mask=at < count, other=0.0)
        same = (weight.to(tl.int32, bitcast=True) == key).to(tl.int32)
        drawn = (same == 1) & (seen + tl.cumsum(same, axis=0) - 1 == place)
        token += tl.sum(tl.where(drawn, tl.load(ids_ptr + at, mask=at < count, other=0), 0), axis=0)
        seen += tl.sum(same, axis=0)
    tl.store(out_ptr + row, token.to(tl.int64))
