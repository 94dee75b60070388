"""An adapter as the operators that the engine runs: per site of the base, what each operator needs. In host memory.

Factors of one shape lie together, so that an adapter is copied in as many calls as it has widths, not sites.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Stack:
    """One factor of the sites where it has the same shape: `memory` [sites, rank, features], in their order."""

    sites: tuple[str, ...]
    memory: Tensor


@dataclass(frozen=True, slots=True)
class LoweredAdapter:
    """At every site y[T, out] += scale * (x[T, in] a^T) b, with a [rank, in] and b [rank, out].

    `ranks` and `scales` are keyed by `Site.name`, in the order of the base's sites; both stacks name each site once.
    """

    kind: str
    ranks: Mapping[str, int]
    scales: Mapping[str, float]
    a: tuple[Stack, ...]
    b: tuple[Stack, ...]

    @property
    def max_rank(self) -> int:
        """The largest rank at any site."""
        return max(self.ranks.values(), default=0)

    @property
    def site_count(self) -> int:
        """How many modules of the base the adapter changes."""
        return len(self.ranks)

    @property
    def bytes(self) -> int:
        """Bytes of all factors."""
        return sum(stack.memory.nbytes for stack in (*self.a, *self.b))
