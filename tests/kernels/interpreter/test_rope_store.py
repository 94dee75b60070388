"""qk_norm_rope_store on Triton, in the interpreter, against float64 math."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chorus.kernels.rope_store_launch import qk_norm_rope_store_op
from support.rope_store import angles, check
from support.rows import DTYPES, noise


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 3), heads=st.sampled_from([(1, 1), (4, 1), (9, 3)]),
    sizes=st.sampled_from([(16, 16), (16, 8), (24, 24), (80, 32), (256, 256)]), dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from([None, "rms", "rms_plus_one"]), interleaved=st.booleans(), strided=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_queries_and_pages_are_their_definition(
    rows: int, heads: tuple[int, int], sizes: tuple[int, int], dtype: torch.dtype, kind: Any, interleaved: bool,
    strided: bool, seed: int,
) -> None:  # fmt: skip
    if dtype is not torch.float32:
        heads = (9, 3)  # an RMS of a few roundings means nothing
    check(rows, heads, *sizes, dtype, kind=kind, interleaved=interleaved, strided=strided, seed=seed, triton=True)


def test_float64_runs_on_the_specification() -> None:
    check(2, (2, 1), 8, 8, torch.float64, kind="rms", triton=True)


def test_the_op_is_what_torch_expects_of_ops() -> None:
    cos, sin = (t.float() for t in angles(3, 8, 0))
    k_cache, v_cache = torch.zeros(2, 1, 4, 8), torch.zeros(2, 1, 4, 8)
    for norms in ((None, None, "", 0.0), (noise(1, 8), noise(2, 8), "rms", 1e-6)):
        arguments = (noise(0, 3, 4, 8), k_cache, v_cache, cos, sin, torch.arange(3), *norms, False)
        torch.library.opcheck(qk_norm_rope_store_op, arguments)
