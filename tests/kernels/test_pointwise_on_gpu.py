"""residual_norm, silu_mul, gelu_tanh_mul and qk_norm_rope_store on a CUDA device."""

from collections.abc import Callable
from typing import get_args

import pytest
import torch

from chorus.kernels.types import NormKind
from support import gated, rope_store
from support.pointwise import check_norm
from support.rows import DTYPES, LAYOUTS, Layout

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", get_args(NormKind))
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [33, 768, 4096, 8192, 16384])
def test_residual_norm_is_its_definition_row_by_row(
    kind: NormKind, layout: Layout, dtype: torch.dtype, width: int
) -> None:
    check_norm(kind, layout, width, dtype, device="cuda")
    check_norm(kind, layout, width, dtype, device="cuda", with_x=False, strided=True)


@pytest.mark.parametrize("operator", gated.DEFINITIONS, ids=lambda o: o.__name__)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [33, 14336])
@pytest.mark.parametrize("fused", [False, True])
def test_gated_products_are_their_definition(
    operator: Callable[..., torch.Tensor], dtype: torch.dtype, width: int, fused: bool
) -> None:
    gated.check(operator, 70, width, dtype, fused=fused, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dim", "width"), [((32, 8), 128, 128), ((9, 3), 80, 32), ((8, 1), 256, 256)])
@pytest.mark.parametrize("kind", [None, "rms", "rms_plus_one"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_queries_and_pages_are_their_definition(
    dtype: torch.dtype, heads: tuple[int, int], dim: int, width: int, kind: NormKind | None, interleaved: bool
) -> None:
    rope_store.check(70, heads, dim, width, dtype, kind=kind, interleaved=interleaved, strided=True, device="cuda")
