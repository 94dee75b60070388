"""act(gate) * up, number by number: what the activation gives is rounded before it is multiplied.

gelu's tanh form is a product with a logistic function, gate / (1 + e^-2u): both take one `exp` and one division.
"""
# numba compiles what it sees, whatever the types say.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import numba
import numpy as np

from chorus.kernels.native.numbers import INLINE, exp, narrow, wide


@numba.njit(**INLINE)
def silu_mul(gate, up):
    return _logistic_mul(gate, wide(gate), up)


@numba.njit(**INLINE)
def gelu_tanh_mul(gate, up):
    return _logistic_mul(gate, _twice_the_argument(wide(gate)), up)


@numba.njit(**INLINE)
def _logistic_mul(gate, z, up):
    """gate / (1 + e^-z), rounded, times up; `exp` ends at e^88, which is no infinity to a gate of 1e38."""
    power = exp(-z) if z > np.float32(-88) else np.float32(np.inf)
    activated = narrow(wide(gate) / (np.float32(1) + power), gate)
    return narrow(wide(activated) * wide(up), gate)


@numba.njit(**INLINE)
def _twice_the_argument(g):
    """Of the tanh in gelu: sqrt(8 / pi) (g + 0.044715 g^3)."""
    return g * (np.float32(1.5957691216) + np.float32(0.0713548163) * g * g)
