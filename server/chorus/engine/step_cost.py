"""How long a step takes, learned from the steps that ran: seconds = fixed + per_token * tokens + per_pair * pairs.

    recent steps, by size     1 token | 2..3 | 4..7 | 8..15 | ...         the last few of each size are kept, so that a
                              . . . .   . .    .      . . . .             minute of decodes does not forget prefills

Pairs are what attention looks at: a token with each one before it, and itself. Errors count in proportion to the step,
and a step that took far longer than its like (a page fault, a neighbour's burst) is left out. No coefficient is
negative: one that comes out so is taken to be 0 and the others are fitted again.

Knows counts and seconds; does not know sequences.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

# Fitting takes 0.2 ms with ten sizes full; spread over the steps between, 13 us a step.
KEPT_OF_A_SIZE = 16
FIT_EVERY = 16
OUTLIER = 3.0
"""Times the median ratio of measured to fitted seconds."""
MOST_SPREAD = 2.0
# Binary digits of a step's tokens. A first, cold step alone would say that each of its few tokens takes a share of it.
APART = 3


class Work(NamedTuple):
    """What a step computes."""

    tokens: int = 0
    pairs: int = 0

    def plus(self, start: int, count: int) -> "Work":
        """With `count` more tokens, of a sequence that has `start` before them."""
        return Work(self.tokens + count, self.pairs + pairs_of(start, count))

    def minus(self, start: int, count: int) -> "Work":
        """Without what `plus` added."""
        return Work(self.tokens - count, self.pairs - pairs_of(start, count))


def pairs_of(start: int, count: int) -> int:
    """Pairs of `count` tokens that have `start` before them."""
    return count * start + count * (count + 1) // 2


class StepCost:
    """The law of this machine, model and load, as far as it is known.

    `spread` is how many times that long the longest of the usual steps take, all but one in 50 of them.
    """

    def __init__(self) -> None:
        self.fixed = self.per_token = self.per_pair = 0.0
        self.spread = 1.0
        self._kept: dict[int, deque[tuple[Work, float]]] = {}
        self._observed = 0

    @property
    def is_known(self) -> bool:
        return self.per_token > 0

    @property
    def knows_tokens(self) -> bool:
        """Whether what a token costs is known apart from what a step costs: steps of four times the size were seen."""
        return len(self._kept) > 1 and max(self._kept) - min(self._kept) >= APART

    def observe(self, work: Work, seconds: float) -> None:
        """A step with this work took so long."""
        if work.tokens < 1 or seconds <= 0:
            return
        size = self._kept.setdefault(work.tokens.bit_length(), deque(maxlen=KEPT_OF_A_SIZE))
        is_new = not size
        size.append((work, seconds))
        self._observed += 1
        if is_new or self._observed % FIT_EVERY == 0:
            self._fit()

    def seconds(self, work: Work) -> float:
        """How long a step with this work takes, typically."""
        return self.fixed + self.per_token * work.tokens + self.per_pair * work.pairs

    def tokens_within(self, seconds: float, start: int) -> int:
        """How many tokens of a sequence that has `start` before them take so many seconds more in a step."""
        if seconds <= 0 or not self.is_known:
            return 0
        # per_pair / 2 * t^2 + linear * t = seconds, solved without taking the difference of two near numbers.
        linear = self.per_token + self.per_pair * (start + 0.5)
        root = (linear * linear + 2 * self.per_pair * seconds) ** 0.5
        return int(2 * seconds / (linear + root))

    def _fit(self) -> None:
        samples = [sample for size in self._kept.values() for sample in size]
        self._set(samples)
        ratios = sorted(seconds / self.seconds(work) for work, seconds in samples)
        limit = OUTLIER * ratios[len(ratios) // 2]
        usual = [(work, seconds) for work, seconds in samples if seconds / self.seconds(work) <= limit]
        self._set(usual)
        ratios = sorted(seconds / self.seconds(work) for work, seconds in usual)
        self.spread = min(max(ratios[len(ratios) * 49 // 50], 1.0), MOST_SPREAD)

    def _set(self, samples: Sequence[tuple[Work, float]]) -> None:
        moments = _moments(samples)
        for columns in ((0, 1, 2), (0, 1), (1, 2), (1,)):
            found = _least_squares(moments, columns)
            if found is not None and min(found) >= 0 and found[columns.index(1)] > 0:
                values = dict(zip(columns, found, strict=True))
                self.fixed, self.per_token, self.per_pair = (values.get(column, 0.0) for column in range(3))
                return


@dataclass(frozen=True, slots=True)
class StepBound:
    """Keeps steps in which somebody decodes to about `seconds`; `least_chunk` tokens of a prompt go in all the same."""

    cost: StepCost
    seconds: float
    least_chunk: int

    def chunk(self, work: Work, start: int, *, first: bool) -> int:
        """Tokens of a prompt that a step with this work can still take, at least 1; `first` if it has no prompt yet.

        As many as let all but unusual steps end in time.
        """
        left = self.seconds / self.cost.spread - self.cost.seconds(work)
        return max(self.cost.tokens_within(left, start), self.least_chunk if first else 1)

    def is_full(self, work: Work) -> bool:
        """Whether no other prompt should begin in a step with this work."""
        left = self.seconds / self.cost.spread - self.cost.seconds(work)
        return self.cost.tokens_within(left, 0) < self.least_chunk


def _moments(samples: Sequence[tuple[Work, float]]) -> list[list[float]]:
    """The normal equations of 1 = (fixed, per_token, per_pair) . (1, tokens, pairs) / seconds, right side last."""
    ones = token = pair = tokens = both = pairs = right = token_right = pair_right = 0.0
    for work, seconds in samples:
        x, y, z = 1 / seconds, work.tokens / seconds, work.pairs / seconds
        ones, token, pair, right = ones + x * x, token + x * y, pair + x * z, right + x
        tokens, both, token_right = tokens + y * y, both + y * z, token_right + y
        pairs, pair_right = pairs + z * z, pair_right + z
    return [[ones, token, pair, right], [token, tokens, both, token_right], [pair, both, pairs, pair_right]]


def _least_squares(moments: Sequence[Sequence[float]], columns: Sequence[int]) -> list[float] | None:
    """The coefficients of some columns where the others' are 0; None if these are not unique."""
    scales = [moments[i][i] ** 0.5 for i in columns]
    if not all(scales):
        return None
    matrix = [
        [*(moments[i][j] / (scale * other) for j, other in zip(columns, scales, strict=True)), moments[i][3] / scale]
        for i, scale in zip(columns, scales, strict=True)
    ]
    solution = _solve(matrix)
    return None if solution is None else [value / scale for value, scale in zip(solution, scales, strict=True)]


def _solve(matrix: list[list[float]]) -> list[float] | None:
    """Gauss-Jordan on a symmetric matrix with a unit diagonal and its right side; None if it is nearly singular."""
    size = len(matrix)
    for i in range(size):
        pivot = matrix[i][i]
        if pivot < 1e-6:
            return None
        matrix[i] = [value / pivot for value in matrix[i]]
        for j in range(size):
            if j != i:
                matrix[j] = [a - matrix[j][i] * b for a, b in zip(matrix[j], matrix[i], strict=True)]
    return [row[-1] for row in matrix]
