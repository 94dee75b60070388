"""What one run of a workload comes to: the figures that S-LoRA reports, and how late we were ourselves."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# A first token within this is in time; satisfaction falls to 0 there.
IN_TIME_S = 6.0


@dataclass
class Outcome:
    """One request, in seconds from the start of the run: when it was due, when it was sent, when tokens came.

    `messages` holds (time, tokens) of each message; `error` is the status of one that failed.
    """

    due: float
    sent: float
    messages: list[tuple[float, int]] = field(default_factory=list)
    adapter_wait: float = 0.0
    error: str | None = None

    @property
    def tokens(self) -> int:
        return sum(tokens for _, tokens in self.messages)

    @property
    def first_token(self) -> float:
        """Seconds from when it was due: a late sender does not flatter the server."""
        return self.messages[0][0] - self.due

    @property
    def inter_token(self) -> float:
        """Mean seconds from token to token."""
        return (self.messages[-1][0] - self.messages[0][0]) / max(self.tokens - 1, 1)


def figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Rates over the time from the first request to the last answer; latencies of what was answered, in seconds.

    Requests that failed are neither in time nor satisfied.
    """
    done = [outcome for outcome in outcomes if outcome.error is None]
    errors = Counter(outcome.error for outcome in outcomes if outcome.error)
    row: dict[str, Any] = {"requests": len(outcomes), "completed": len(done), "errors": dict(errors)}
    if not done:
        return row
    seconds = max(outcome.messages[-1][0] for outcome in done)
    first = np.array([outcome.first_token for outcome in done])
    inter = np.array([outcome.inter_token for outcome in done if outcome.tokens > 1])
    satisfied = np.clip(1 - (first / IN_TIME_S) ** 2, 0, 1)
    return row | {
        "seconds": seconds,
        "requests_s": len(done) / seconds,
        "output_tokens_s": sum(outcome.tokens for outcome in done) / seconds,
        **_spread("first_token", first),
        **_spread("inter_token", inter),
        "attainment": float((first < IN_TIME_S).sum()) / len(outcomes),
        "satisfaction": float(satisfied.sum()) / len(outcomes),
        "waited_for_adapter": sum(outcome.adapter_wait > 0 for outcome in done) / len(done),
        "send_lag_p99": float(np.quantile([outcome.sent - outcome.due for outcome in outcomes], 0.99)),
    }


def _spread(name: str, seconds: "np.typing.NDArray[np.float64]") -> dict[str, float]:
    if not len(seconds):
        return {}
    quantiles = {f"{name}_p{percent}": float(np.quantile(seconds, percent / 100)) for percent in (50, 90, 99)}
    return {f"{name}_mean": float(seconds.mean()), **quantiles}
