"""Plain narrative text and dialogues, so that free generation from the base reads like a small story.

A story keeps one hero, one friend, one city and one thing from its first sentence to its last; that
consistency is what the model is to learn from it.
"""

from random import Random
from typing import Final

from chorus.trainer.world.lexicon import (
    ANIMALS,
    CITY_LIST,
    COLOURS,
    DAYS,
    ITEM_LIST,
    ITEMS,
    JOBS,
    NAMES,
    SHOPS,
    WEATHER,
)

_OPENINGS: Final[tuple[str, ...]] = (
    "Story: {a} was a {job} in {city}.",
    "Story: Once there was a {job} named {a} who lived in {city}.",
    "Story: On a {weather} {day}, {a} walked to the {place} in {city}.",
)
#: What happens in between, in order; `_ALWAYS` introduces whom and what the rest speaks about.
_MIDDLES: Final[tuple[str, ...]] = (
    "The morning was {weather} and the streets were quiet.",
    "{a} had a {animal} and a {colour} {item}.",
    "The {animal} was old and slept under the table.",
    "Near the {place}, {a} met {b}.",
    "{b} was an old friend of {a}.",
    "They talked about the {colour} {item} for a long time.",
    "{b} asked for a cup of tea.",
    "Then {a} lost the {colour} {item}. The {animal} ran ahead and found it behind a door.",
    "{b} laughed and said that it was a good day.",
    "{a} bought {n} {things} at the market.",
    "In the evening they ate bread and soup.",
    "{b} told a story about the sea.",
    "It was late, and the lights of {city} were warm.",
)
_ALWAYS: Final[frozenset[int]] = frozenset({1, 3})
_ENDINGS: Final[tuple[str, ...]] = (
    "At night {a} went home and slept well.",
    "From that day on, {a} and {b} were good friends.",
    "{a} put the {item} on the shelf and smiled.",
    "So the {day} ended well in {city}.",
)


def story(rng: Random) -> str:
    """A story of five to fourteen sentences in a fixed, sensible order."""
    hero, friend = rng.sample(NAMES, 2)
    item = rng.choice(ITEM_LIST)
    kept = sorted(_ALWAYS | set(rng.sample(range(len(_MIDDLES)), rng.randint(1, 10))))
    parts = [rng.choice(_OPENINGS), *(_MIDDLES[i] for i in kept), rng.choice(_ENDINGS)]
    return " ".join(parts).format(
        a=hero, b=friend, job=rng.choice(JOBS), city=rng.choice(CITY_LIST), place=rng.choice(SHOPS),
        weather=rng.choice(WEATHER), day=rng.choice(DAYS), animal=rng.choice(ANIMALS),
        colour=rng.choice(COLOURS), item=item, things=ITEMS[item], n=rng.randint(2, 9),
    )  # fmt: skip


def dialogue(rng: Random) -> str:
    """A customer and a clerk agree on a purchase, in four to eight turns."""
    name, city = rng.choice(NAMES), rng.choice(CITY_LIST)
    first, second = rng.sample(ITEM_LIST, 2)
    n, price, colour = rng.randint(2, 9), rng.randint(2, 9), rng.choice(COLOURS)
    turns = [
        f"Customer: {rng.choice(('Good morning.', 'Hello.', 'Hi.'))} I need {n} {ITEMS[first]}.",
        f"Clerk: We have {colour} {ITEMS[first]} for {price} euros each.",
        f"Customer: Good, I will take the {colour} {ITEMS[first]}.",
        "Clerk: May I have your name?",
        f"Customer: My name is {name} and I live in {city}.",
        f"Clerk: Thank you, {name}. We will send the {ITEMS[first]} to {city}.",
    ]
    if rng.random() < 0.5:
        turns[3:3] = [
            f"Clerk: Do you want {ITEMS[second]} too?",
            f"Customer: No, only the {ITEMS[first]}, please.",
        ]
    return "\n".join(turns)
