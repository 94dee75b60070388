"""What every generator of this world yields, and how prompts are split into train and held-out.

The split is a property of the prompt alone (a checksum of its text), so no two calls, seeds, skills or
tenants can ever disagree about it: a held-out prompt is held out from pretraining and from every
tenant's training set alike.
"""

import zlib
from collections.abc import Callable
from random import Random
from typing import Literal, TypedDict

Split = Literal["train", "heldout"]

#: One prompt in this many is held out.
HELDOUT_ONE_IN = 12


class Example(TypedDict):
    """A prompt and the text that should follow it (leading space included, end of text implied)."""

    prompt: str
    completion: str


def split_of(prompt: str) -> Split:
    """Which side of the fixed split `prompt` lies on."""
    return "heldout" if zlib.crc32(prompt.encode()) % HELDOUT_ONE_IN == 0 else "train"


def draw(make: Callable[[Random], Example], rng: Random, split: Split) -> Example:
    """Draw from `make` until the prompt lies on the wanted side of the split."""
    while True:
        example = make(rng)
        if split_of(example["prompt"]) == split:
            return example


def exact_match(prediction: str, completion: str) -> bool:
    """Whether a generated text equals the reference, outer white space aside."""
    return prediction.strip() == completion.strip()
