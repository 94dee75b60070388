"""A row to learn from, in tokens."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids, and the positions in them that the loss is taken on: in order, at least one, never at a start.

    `starts` are where examples begin, in order: one, or several in a packed row (`packing`).
    """

    ids: tuple[int, ...]
    targets: tuple[int, ...]
    starts: tuple[int, ...] = (0,)

    @classmethod
    def after_prompt(cls, ids: tuple[int, ...], prompt_length: int) -> "Encoded":
        """One of which everything after the prompt is learned."""
        return cls(ids, tuple(range(prompt_length, len(ids))))
