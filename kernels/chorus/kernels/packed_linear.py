"""`PackedWeight`: a linear's weight on a CPU in bfloat16, in the layout that it is multiplied in, and only there.

Where oneDNN multiplies bfloat16 the layout is oneDNN's. Up to 64 rows a kernel of our own reads it where it lies
(`native.packed_linear`), more rows are oneDNN's. Ours takes 0.83 of the time at 16 rows and 0.7 to 0.8 up to 8, where
oneDNN does not read at the machine's bandwidth; from 64 rows on both compute at the machine's rate. With AMX it is 0.75
of the time at 16 rows, where it reads as fast as anybody can, and 0.85 at 64. All is oneDNN's where the machine lacks
AVX512_BF16, or where oneDNN has laid the weight otherwise.

Where oneDNN refuses the dtype, as it does on AVX2 alone, any number of rows is a kernel's of our own, which widens
weights in registers (`native.widened_linear`).
"""

from typing import Protocol

import torch
from torch import Tensor

from chorus.kernels.cpu_products import product_dtype
from chorus.kernels.reference import GatedActivation
from chorus.kernels.silu_mul import gated_mul

# Rows that the layout is made for. oneDNN is as fast with it as with the plain one at 512, and twice as fast at 16.
PACKED_FOR_ROWS = 16


class PackedWeight:
    """W [N, K], bfloat16; the tensor that it is made of is not kept."""

    def __init__(self, weight: Tensor) -> None:
        self.shape = weight.shape
        as_it_is = product_dtype(weight.dtype) == weight.dtype
        self._layout: _Layout = _OneDnns(weight) if as_it_is else _Widened(weight)

    def linear(self, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """x W^T + bias + residual, a new tensor, rounded once: `reference.linear`.

        x [..., K], bias [N], residual and the result [..., N].

        Raises:
            ValueError: a tensor is of another dtype or does not fit the weight.
        """
        self._check(x, bias, residual)
        return self._layout.linear(x, bias, residual)

    def gated(self, x: Tensor, bias: Tensor | None, activation: GatedActivation) -> Tensor:
        """act(gate) * up, [T, N / 2], of `linear(x, bias)`, whose first columns are the gate's and the others up's.

        To the bit what `linear` and then `gated_mul` give; x [T, K].

        Raises:
            ValueError: a tensor is of another dtype or does not fit the weight, or the weight has no two halves.
        """
        self._check(x, bias, None)
        if x.dim() != 2:
            raise ValueError(f"x: want [T, {self.shape[1]}], got {tuple(x.shape)}")
        if self.shape[0] % 2:
            raise ValueError(f"weight: want two halves of equally many rows, got {self.shape[0]}")
        return self._layout.gated(x, bias, activation)

    def dense(self) -> Tensor:
        """W [N, K] as it was, to the bit."""
        return self._layout.dense()

    def _check(self, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
        n, k = self.shape
        fits = x.shape[-1] == k and (bias is None or (bias.shape == (n,) and bias.is_contiguous()))
        if not fits or (residual is not None and residual.shape != (*x.shape[:-1], n)):
            raise ValueError(f"x, bias, residual: want [..., {k}], [{n}], [..., {n}], got {_said(x, bias, residual)}")
        if any(tensor is not None and tensor.dtype != torch.bfloat16 for tensor in (x, bias, residual)):
            raise ValueError(f"x, bias, residual: want bfloat16 as the weight, got {_said(x, bias, residual)}")


class _Layout(Protocol):
    """How a weight lies, and who multiplies it; what it is given has been checked."""

    def linear(self, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor: ...

    def gated(self, x: Tensor, bias: Tensor | None, activation: GatedActivation) -> Tensor: ...

    def dense(self) -> Tensor: ...


class _OneDnns:
    def __init__(self, weight: Tensor) -> None:
        from chorus.kernels.native import packed_gate  # numba is not everywhere
        from chorus.kernels.native import packed_linear as native

        self._n, self._k = weight.shape
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS)
        self._address = native.address_of(self._packed, weight)
        self._few_rows = 0 if self._address is None else native.MOST_ROWS
        self._multiply, self._gate = native.packed_linear, packed_gate.packed_gate
        self._has_halves = self._n % (2 * native.PANEL) == 0

    def linear(self, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        if not 0 < x.numel() <= self._few_rows * self._k:
            return self._of_many_rows(x, bias, residual)
        y = x.new_empty((*x.shape[:-1], self._n))
        assert self._address is not None
        self._multiply(_rows(y), _rows(x), self._address, bias, None if residual is None else _rows(residual))
        return y

    def gated(self, x: Tensor, bias: Tensor | None, activation: GatedActivation) -> Tensor:
        if not (self._has_halves and 0 < len(x) <= self._few_rows):
            return _gated(self.linear(x, bias, None), activation)
        y = x.new_empty((len(x), self._n // 2))
        assert self._address is not None
        self._gate(y, _rows(x), self._address, bias, activation)
        return y

    def dense(self) -> Tensor:
        weight: Tensor = self._packed.to_dense()
        return weight

    def _of_many_rows(self, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """The operators that Inductor emits for oneDNN."""
        if residual is None:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")
        else:
            y = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._packed, bias, "add")
        return y


class _Widened:
    def __init__(self, weight: Tensor) -> None:
        from chorus.kernels.native import widened_linear as native  # numba is not everywhere

        self._n, self._k = weight.shape
        self._packed = native.packed(weight)
        self._multiply, self._unpacked = native.widened_linear, native.unpacked

    def linear(self, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        y = x.new_empty((*x.shape[:-1], self._n))
        if y.numel():
            self._multiply(_rows(y), _rows(x), self._packed, bias, None if residual is None else _rows(residual))
        return y

    def gated(self, x: Tensor, bias: Tensor | None, activation: GatedActivation) -> Tensor:
        return _gated(self.linear(x, bias, None), activation)

    def dense(self) -> Tensor:
        return self._unpacked(self._packed, self._n, self._k)


def _gated(both: Tensor, activation: GatedActivation) -> Tensor:
    """act(gate) * up of their columns side by side."""
    gate, up = both.chunk(2, dim=-1)
    return gated_mul(gate, up, activation)


def _rows(tensor: Tensor) -> Tensor:
    """[T, width], each row contiguous."""
    rows = tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _said(*tensors: Tensor | None) -> str:
    return ", ".join("None" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in tensors)
