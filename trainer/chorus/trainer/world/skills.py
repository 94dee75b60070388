"""The generic skills the embedded base is pretrained on, each a function from a `Random` to an `Example`.

Every prompt ends with a cue and a colon (`City:`), every completion starts with a space and is fully
determined by the prompt, so exact match is a fair measure. `SKILLS` maps names to functions.
"""

from collections.abc import Callable
from random import Random
from typing import Final

from chorus.trainer.world.example import Example
from chorus.trainer.world.lexicon import (
    CITIES,
    CITY_LIST,
    COLOURS,
    ITEM_LIST,
    ITEMS,
    JOBS,
    MONTHS,
    NAMES,
    SHOPS,
)
from chorus.trainer.world.messages import REPLIES, make_message, make_review


def _example(body: str, cue: str, answer: str) -> Example:
    return {"prompt": f"{body}\n{cue}:", "completion": f" {answer}"}


def field(rng: Random) -> Example:
    """Copy one stated fact out of a message: its writer, city, thing or count."""
    message = make_message(rng)
    cue, answer = rng.choice(
        (
            ("Name", message.name),
            ("City", message.city),
            ("Item", message.item),
            ("Count", str(message.count)),
        )
    )
    return _example(f"Message: {message.text}", cue, answer)


def topic(rng: Random) -> Example:
    """Say what a message is about, in one word of a fixed list of eight."""
    message = make_message(rng)
    return _example(f"Message: {message.text}", "Topic", message.topic)


def tone(rng: Random) -> Example:
    """Say how a message sounds: calm, angry or urgent."""
    message = make_message(rng)
    return _example(f"Message: {message.text}", "Tone", message.tone)


def summary(rng: Random) -> Example:
    """List all facts of a message in a fixed order."""
    m = make_message(rng)
    answer = f"{m.topic}, {m.tone}, {m.name}, {m.city}, {m.count} {m.item}"
    return _example(f"Message: {m.text}", "Summary", answer)


def reply(rng: Random) -> Example:
    """Answer a message politely; the wording depends on its topic."""
    message = make_message(rng)
    return _example(f"Message: {message.text}", "Reply", message.fill(REPLIES[message.topic]))


def mood(rng: Random) -> Example:
    """Judge a review: happy, unhappy or mixed."""
    text, answer = make_review(rng)
    return _example(f"Review: {text}", "Mood", answer)


def capitals(rng: Random) -> Example:
    """Write two words in capital letters."""
    word = rng.choice((rng.choice(CITY_LIST), rng.choice(NAMES)))
    text = f"{rng.choice(COLOURS)} {word}"
    return _example(f"Words: {text}", "Capitals", text.upper())


def date(rng: Random) -> Example:
    """Turn an ISO date into words: 2024-03-17 -> 17 March 2024."""
    year, month, day = rng.randint(2000, 2039), rng.randint(1, 12), rng.randint(1, 28)
    answer = f"{day} {MONTHS[month - 1]} {year}"
    return _example(f"Date: {year}-{month:02d}-{day:02d}", "In words", answer)


def count(rng: Random) -> Example:
    """Count how often a thing stands in a short list (1 to 4 times)."""
    wanted, *others = rng.sample(ITEM_LIST, 3)
    listed = [wanted] * rng.randint(1, 4) + rng.choices(others, k=rng.randint(1, 3))
    rng.shuffle(listed)
    return _example(f"List: {', '.join(listed)}\nThing: {wanted}", "How many", str(listed.count(wanted)))


def position(rng: Random) -> Example:
    """Give the first or last thing of a list, or the list reversed."""
    listed = rng.sample(ITEM_LIST, rng.randint(3, 5))
    cue, answer = rng.choice((("First", listed[0]), ("Last", listed[-1]), ("Reversed", ", ".join(reversed(listed)))))
    return _example(f"List: {', '.join(listed)}", cue, answer)


def repeat(rng: Random) -> Example:
    """Write a list of any known words again, or only what follows a given word in it."""
    listed = rng.sample((*NAMES, *CITY_LIST, *ITEM_LIST, *COLOURS, *JOBS), rng.randint(3, 8))
    if rng.random() < 0.5:
        return _example(f"List: {', '.join(listed)}", "Again", ", ".join(listed))
    asked = rng.randrange(len(listed) - 1)
    return _example(f"List: {', '.join(listed)}\nThing: {listed[asked]}", "Next", listed[asked + 1])


def where(rng: Random) -> Example:
    """Answer a question about one of three stated facts."""
    people = rng.sample(NAMES, 3)
    cities, jobs = rng.sample(CITY_LIST, 3), rng.sample(JOBS, 3)
    asked = rng.randrange(3)
    if rng.random() < 0.5:
        facts = " ".join(f"{p} lives in {c}." for p, c in zip(people, cities, strict=True))
        question, answer = f"Where does {people[asked]} live?", f"In {cities[asked]}."
    else:
        facts = " ".join(f"{p} is a {j}." for p, j in zip(people, jobs, strict=True))
        question, answer = f"Who is the {jobs[asked]}?", f"{people[asked]}."
    return _example(f"Facts: {facts}\nQuestion: {question}", "Answer", answer)


def hours(rng: Random) -> Example:
    """Read opening hours: when a place opens or closes, and whether it is open at a given hour."""
    place, city = rng.choice(SHOPS), rng.choice(CITY_LIST)
    opens, closes = rng.randint(6, 11), rng.randint(14, 21)
    hour = rng.randint(5, 22)
    question, answer = rng.choice(
        (
            ("When does it open?", f"At {opens}."),
            ("When does it close?", f"At {closes}."),
            (f"Is it open at {hour}?", "Yes." if opens <= hour < closes else "No."),
        )
    )
    text = f"The {place} in {city} opens at {opens} and closes at {closes}."
    return _example(f"Hours: {text}\nQuestion: {question}", "Answer", answer)


def cheapest(rng: Random) -> Example:
    """Name the cheapest or dearest of three things."""
    things, prices = rng.sample(ITEM_LIST, 3), rng.sample(range(1, 10), 3)
    ranked = sorted(zip(prices, things, strict=True))
    cue, answer = rng.choice((("Cheapest", ranked[0][1]), ("Dearest", ranked[-1][1])))
    listed = ", ".join(f"{t} {p}" for t, p in zip(things, prices, strict=True))
    return _example(f"Prices: {listed}", cue, answer)


def sentence(rng: Random) -> Example:
    """Write a card of facts as one sentence."""
    name, city, job = rng.choice(NAMES), rng.choice(CITY_LIST), rng.choice(JOBS)
    colour, item = rng.choice(COLOURS), rng.choice(ITEM_LIST)
    body = f"Card: name {name}; job {job}; city {city}; has {colour} {item}"
    return _example(body, "Sentence", f"{name} is a {job} in {city} and has a {colour} {item}.")


def stock(rng: Random) -> Example:
    """Answer a customer from a stock list, as a clerk would."""
    things = rng.sample(ITEM_LIST, 4)
    counts = rng.choices(range(2, 10), k=3)
    listed = ", ".join(f"{n} {ITEMS[t]}" for n, t in zip(counts, things[:3], strict=True))
    asked = rng.choice((0, 1, 2, 3))
    plural = ITEMS[things[asked]]
    answer = f"No, we have no {plural}." if asked == 3 else f"Yes, we have {counts[asked]} {plural}."
    return _example(f"Stock: {listed}\nCustomer: Do you have {plural}?", "Clerk", answer)


def country(rng: Random) -> Example:
    """Name the country of a city (remembered, not read)."""
    city, name = rng.choice(CITY_LIST), rng.choice(NAMES)
    return _example(f"Fact: {name} lives in {city}.", "Country", CITIES[city])


SKILLS: Final[dict[str, Callable[[Random], Example]]] = {
    "field": field, "topic": topic, "tone": tone, "summary": summary, "reply": reply,
    "mood": mood, "capitals": capitals, "date": date, "count": count, "position": position,
    "repeat": repeat, "where": where, "hours": hours, "cheapest": cheapest, "sentence": sentence, "stock": stock,
    "country": country,
}  # fmt: skip
