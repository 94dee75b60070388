"""residual_norm, silu_mul and gelu_tanh_mul on a CUDA device."""

from collections.abc import Callable
from typing import get_args

import pytest
import torch

from chorus.kernels.types import NormKind
from support.gated import DEFINITIONS, check
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


@pytest.mark.parametrize("operator", DEFINITIONS, ids=lambda o: o.__name__)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [33, 14336])
@pytest.mark.parametrize("fused", [False, True])
def test_gated_products_are_their_definition(
    operator: Callable[..., torch.Tensor], dtype: torch.dtype, width: int, fused: bool
) -> None:
    check(operator, 70, width, dtype, fused=fused, device="cuda")
