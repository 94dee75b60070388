"""Which adapter of a run is kept, and when more steps are not worth it.

Knows validation results in order. Does not know how they are measured or what a step is.
"""

from dataclasses import asdict, dataclass
from typing import Any, Final, Self

from torch import Tensor

from chorus.trainer.metrics import Validation

#: Metrics of `Validation` where more is better; of the others less is.
RISING: Final = frozenset({"token_accuracy", "exact_match"})


@dataclass(frozen=True, slots=True)
class Best:
    """The adapter that did best so far: its tensors on the CPU, by parameter name."""

    step: int
    validation: Validation
    tensors: dict[str, Tensor]


class Selection:
    """Keeps the best adapter by one metric, the first of equals; counts evaluations without progress.

    Progress is a gain of more than `min_delta` over the last progress, so that many small gains add up; any gain at all
    makes an adapter the best.
    """

    def __init__(self, metric: str, patience: int | None, min_delta: float) -> None:
        self._metric = metric
        self._patience = patience
        self._min_delta = min_delta
        self.best: Best | None = None
        self._mark: float | None = None
        self._stale = 0

    @property
    def exhausted(self) -> bool:
        """True once `patience` evaluations in a row made no progress."""
        return self._patience is not None and self._stale >= self._patience

    def offer(self, step: int, validation: Validation, tensors: dict[str, Tensor]) -> None:
        """Takes the evaluation after `step`; `tensors` are kept as they are, so give a copy."""
        score = self._score(validation)
        if self.best is None or score > self._score(self.best.validation):
            self.best = Best(step, validation, tensors)
        if self._mark is None or score > self._mark + self._min_delta:
            self._mark, self._stale = score, 0
        else:
            self._stale += 1

    def state(self) -> dict[str, Any]:
        """All of it but the tensors, for JSON."""
        best = self.best and {"step": self.best.step, "validation": asdict(self.best.validation)}
        return {"best": best, "mark": self._mark, "stale": self._stale}

    def restored(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        """Takes on what `state` gave, with the best adapter's tensors."""
        best = state["best"]
        self.best = best and Best(best["step"], Validation(**best["validation"]), tensors)
        self._mark, self._stale = state["mark"], state["stale"]
        return self

    def _score(self, validation: Validation) -> float:
        value: float = getattr(validation, self._metric)
        return value if self._metric in RISING else -value
