"""The pretraining text: an endless, seeded stream of documents drawn from skills and stories.

A document is (prompt, completion): the trainer may weigh the two differently. Narratives have no prompt.
"""

from collections.abc import Iterator
from random import Random
from typing import Final

from chorus.trainer.world.example import Example, draw
from chorus.trainer.world.skills import SKILLS
from chorus.trainer.world.stories import dialogue, story

#: Shares of the skills in the stream; what is hard to learn comes more often.
WEIGHTS: Final[dict[str, float]] = {
    "field": 8, "topic": 4, "tone": 4, "summary": 10, "reply": 10, "mood": 4, "capitals": 3,
    "date": 3, "count": 5, "position": 5, "repeat": 20, "where": 6, "hours": 5, "cheapest": 5, "sentence": 4,
    "stock": 5, "country": 2, "story": 8, "dialogue": 4,
}  # fmt: skip


def documents(seed: int) -> Iterator[Example]:
    """Training documents for ever; only prompts of the train split occur."""
    rng = Random(seed)
    names, weights = list(WEIGHTS), list(WEIGHTS.values())
    while True:
        name = rng.choices(names, weights)[0]
        if name == "story":
            yield {"prompt": "", "completion": story(rng)}
        elif name == "dialogue":
            yield {"prompt": "", "completion": dialogue(rng)}
        else:
            yield draw(SKILLS[name], rng, "train")


def heldout_examples(skill: str, seed: int, n: int) -> list[Example]:
    """`n` held-out examples of one skill, for measuring."""
    rng = Random(seed)
    return [draw(SKILLS[skill], rng, "heldout") for _ in range(n)]
