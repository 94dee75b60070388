"""Kernels for a CPU, compiled by numba: what torch has no operator for and would need a dozen calls.

    numbers.py           bfloat16, float16 and addresses in a kernel; exp
    team.py              how a kernel is compiled, kept and run on the threads that torch computes with
    decode_attention.py  decodes over paged keys and values
    prompt_attention.py  chunks of prompts over the same
    page_tiles.py        their innermost loops, in registers
    packed_linear.py     linears of few rows, over weights as oneDNN packs them
    dot_tile.py          their innermost loop, in registers
    amx_tile.py          the same in tiles, on a CPU that has them
    widened_linear.py    linears on a CPU that does not multiply bfloat16
    fma_tile.py          their innermost loop, in registers
    low_rank.py          many adapters' deltas for segments of few rows
    rank_tiles.py        its innermost loops
    rope_store.py        queries and keys normed and rotated, keys and values stored
    head_tile.py         a head rotated, in registers
    residual_norm.py     sums and their norms
    packed_gate.py       two of them and act(gate) * up
    gated_mul.py         act(gate) * up, where that has to be done apart
    gate.py              their innermost step
    likeliest.py         greedy tokens
    program.py           calls of kernels, one after the other, as one
    tape.py              a computation recorded as programs, and asked for again

A kernel takes work items by a ticket, so threads of unequal speed end together, and an item is computed by one thread
alone: same inputs, same bits, whatever the number of threads. Sums are float32.
"""

import torch

from chorus.kernels.cpu_products import product_dtype
from chorus.kernels.native import (
    decode_attention,
    gated_mul,
    likeliest,
    low_rank,
    packed_gate,
    packed_linear,
    program,
    prompt_attention,
    residual_norm,
    rope_store,
    widened_linear,
)
from chorus.kernels.native.numbers import HELD_AS


def prepare(dtype: torch.dtype, head_dim: int, block_size: int) -> None:
    """Compiles now what the first step would wait for: 2 s a kernel, once on a machine; a tenth of that when kept."""
    if dtype in HELD_AS:
        decode_attention.prepare(dtype, head_dim, block_size)
        prompt_attention.prepare(dtype, head_dim, block_size)
        low_rank.prepare(dtype)
        rope_store.prepare(dtype, head_dim)
        (packed_linear if product_dtype(dtype) == dtype else widened_linear).prepare(dtype)
        packed_gate.prepare(dtype)
        likeliest.prepare(dtype)
        likeliest.prepare(torch.float32)  # of logits with penalties
        program.prepare()
        if dtype != torch.float32:
            residual_norm.prepare(dtype)
            gated_mul.prepare(dtype)
