"""S-LoRA's synthetic traffic: who asks when, for which adapter, with how long a prompt and answer.

Adapters follow a power law: index floor(u^(1/alpha) * n), so adapter 0 is the most popular, with (1/n)^alpha of all
requests; alpha = 1 is uniform. Gaps follow a gamma distribution of shape 1/cv^2 and mean 1/rate; cv = 1 is Poisson.
Lengths are uniform. The same fields give the same trace, whatever the version of numpy: RandomState is frozen.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

SEED = 42
BASE = -1


class Arrival(NamedTuple):
    """A request `at` seconds from the start; `adapter` is an index, or BASE."""

    at: float
    adapter: int
    tokens_in: int
    tokens_out: int


@dataclass(frozen=True)
class Workload:
    """`rate` requests/s for `duration` seconds over so many adapters, 0 for the base alone.

    `tokens_in` and `tokens_out` are [low, high): the higher end is not reached.
    """

    rate: float
    duration: float
    adapters: int
    alpha: float = 0.3
    cv: float = 1.0
    tokens_in: tuple[int, int] = (8, 512)
    tokens_out: tuple[int, int] = (8, 512)
    seed: int = SEED

    def arrivals(self) -> list[Arrival]:
        """In the order of time."""
        random = np.random.RandomState(self.seed)
        count = int(self.rate * self.duration)
        adapters = np.floor(random.power(self.alpha, count) * self.adapters).astype(int)
        if not self.adapters:
            adapters[:] = BASE
        tokens_in = random.randint(*self.tokens_in, count)
        tokens_out = random.randint(*self.tokens_out, count)
        shape = 1 / self.cv**2
        at = np.cumsum(random.gamma(shape, self.cv**2 / self.rate, count))
        columns = (column.tolist() for column in (at, adapters, tokens_in, tokens_out))
        return [Arrival(*row) for row in zip(*columns, strict=True)]
