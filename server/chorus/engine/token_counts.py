"""Which tokens a sequence holds, and how often: what its penalties are computed from.

    ids      [ 7 | 11 | 13 | 5 ]     each token once, in the order of its first appearance
    counts   [ 0 |  0 |  2 | 1 ]     how often it is in the output; 0 for a token of the prompt alone

The counts follow the output token by token, so a step costs what is new, not what is long: a decode of 8,000 tokens
counts one. They say nothing but what the tokens say, so preemption does not change them.
"""

from array import array
from collections.abc import Iterable


class TokenCounts:
    """Starts with a prompt, or with nothing where the prompt does not count; follows one growing output."""

    __slots__ = ("_at", "_read", "counts", "ids")

    def __init__(self, prompt: Iterable[int]) -> None:
        self.ids = array("q", dict.fromkeys(prompt))
        self.counts = array("q", bytes(8 * len(self.ids)))
        self._at = {token: at for at, token in enumerate(self.ids)}
        self._read = 0

    def follow(self, output: list[int]) -> None:
        """Counts the tokens that the output has got since the last call."""
        for token in output[self._read :]:
            at = self._at.setdefault(token, len(self.ids))
            if at == len(self.ids):
                self.ids.append(token)
                self.counts.append(0)
            self.counts[at] += 1
        self._read = len(output)
