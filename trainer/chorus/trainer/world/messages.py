"""Customer messages and reviews: the texts that the skills and the three demo tenants share.

A `Message` keeps the facts it was written from, so every task over it (classify, extract, reply) has an
exact answer. Facts never depend on one another beyond `TONES_OF`, so none can be guessed from the rest.
"""

from dataclasses import dataclass
from random import Random
from typing import Final, Literal

from chorus.trainer.world.lexicon import CITY_LIST, COLOURS, ITEM_LIST, ITEMS, NAMES

Topic = Literal["damage", "delay", "billing", "return", "mistake", "order", "praise", "stock"]
Tone = Literal["calm", "angry", "urgent"]

TOPICS: Final[dict[Topic, tuple[str, ...]]] = {
    "damage": (
        "My {n} {things} arrived broken.",
        "The {n} {things} came with cracks.",
        "All {n} {things} were broken in the parcel.",
        "I found my {n} {things} damaged.",
    ),
    "delay": (
        "I still wait for my {n} {things}.",
        "My {n} {things} are late.",
        "Where are the {n} {things} I paid for?",
        "The {n} {things} have not arrived yet.",
    ),
    "billing": (
        "I paid twice for {n} {things}.",
        "The bill for my {n} {things} is too high.",
        "You charged me too much for {n} {things}.",
        "There is an error on the bill for {n} {things}.",
    ),
    "return": (
        "I want to send back {n} {things}.",
        "How can I return the {n} {things}?",
        "I do not need the {n} {things} any more.",
        "Please take back my {n} {things}.",
    ),
    "mistake": (
        "I got {n} {things} that I did not ask for.",
        "You sent me {n} {things} by mistake.",
        "These {n} {things} are not mine.",
        "I opened the parcel and saw the wrong {n} {things}.",
    ),
    "order": (
        "I would like to buy {n} {things}.",
        "Please send me {n} {things}.",
        "I want to order {n} {things}.",
        "Can I have {n} new {things}?",
    ),
    "praise": (
        "I love my {n} {things}.",
        "The {n} {things} are wonderful.",
        "My family is happy with the {n} {things}.",
        "The {n} {things} look great.",
    ),
    "stock": (
        "Do you have {n} {things} in stock?",
        "Are there {n} {things} left?",
        "Do you still sell {things}? I may need {n}.",
        "Is it true that only {n} {things} are left?",
    ),
}

TONE_PHRASES: Final[dict[Tone, tuple[str, ...]]] = {
    "calm": ("Thank you.", "Have a nice day.", "Kind regards.", "Best wishes."),
    "angry": ("I am very upset.", "This is a shame.", "I am furious.", "What a bad shop!"),
    "urgent": ("It can not wait.", "I need help today.", "Please hurry.", "Answer at once."),
}

TONES_OF: Final[dict[Topic, tuple[Tone, ...]]] = {
    "damage": ("calm", "angry", "urgent"),
    "delay": ("calm", "angry", "urgent"),
    "billing": ("calm", "angry", "urgent"),
    "return": ("calm", "angry", "urgent"),
    "mistake": ("calm", "angry", "urgent"),
    "order": ("calm", "urgent"),
    "praise": ("calm",),
    "stock": ("calm", "urgent"),
}

INTRODUCTIONS: Final[tuple[str, ...]] = (
    "This is {name} from {city}.",
    "I am {name} and I live in {city}.",
    "Hello, my name is {name}. I live in {city}.",
    "Hi, {name} from {city} here.",
    "Good morning from {city}, I am {name}.",
)

#: What the plain base answers under `Reply:`, by topic.
REPLIES: Final[dict[Topic, str]] = {
    "damage": "Dear {name}, we are sorry. We will send new {things} to {city}.",
    "delay": "Dear {name}, your {things} are on the way to {city}.",
    "billing": "Dear {name}, we will check the bill for your {things}.",
    "return": "Dear {name}, you can bring the {things} to our shop in {city}.",
    "mistake": "Dear {name}, please keep the {things}. We are sorry.",
    "order": "Dear {name}, we will send {n} {things} to {city}.",
    "praise": "Dear {name}, we are glad that you like the {things}.",
    "stock": "Dear {name}, yes, we have {n} {things} for you.",
}


@dataclass(frozen=True, slots=True)
class Message:
    """A customer's message with the facts it states."""

    text: str
    name: str
    city: str
    count: int
    item: str
    topic: Topic
    tone: Tone

    @property
    def things(self) -> str:
        """The plural of the item, as it stands in the text."""
        return ITEMS[self.item]

    def fill(self, template: str) -> str:
        """`template` with this message's facts: {name} {city} {n} {item} {things}."""
        return template.format(name=self.name, city=self.city, n=self.count, item=self.item, things=self.things)


def make_message(rng: Random) -> Message:
    """One message, all facts drawn independently."""
    name, city, item = rng.choice(NAMES), rng.choice(CITY_LIST), rng.choice(ITEM_LIST)
    count = rng.randint(2, 9)
    topic = rng.choice(tuple(TOPICS))
    tone = rng.choice(TONES_OF[topic])
    parts = (rng.choice(INTRODUCTIONS), rng.choice(TOPICS[topic]), rng.choice(TONE_PHRASES[tone]))
    text = " ".join(parts).format(name=name, city=city, n=count, item=item, things=ITEMS[item])
    return Message(text, name, city, count, item, topic, tone)


Mood = Literal["happy", "unhappy", "mixed"]

GOOD: Final[tuple[str, ...]] = (
    "It works well.", "The price is fair.", "It looks lovely.", "I use it every day.",
    "It came on time.", "It is strong and light.", "My friends like it too.",
)  # fmt: skip
BAD: Final[tuple[str, ...]] = (
    "It broke after a week.", "The price is too high.", "It looks cheap.", "It smells odd.",
    "It came too late.", "It is heavy and weak.", "I will not buy it again.",
)  # fmt: skip


def make_review(rng: Random) -> tuple[str, Mood]:
    """A short review of one thing, and its mood: happy, unhappy or mixed."""
    mood: Mood = rng.choice(("happy", "unhappy", "mixed"))
    if mood == "mixed":
        remarks = [rng.choice(GOOD), rng.choice(BAD)]
        rng.shuffle(remarks)
    else:
        remarks = rng.sample(GOOD if mood == "happy" else BAD, 2)
    opening = rng.choice(("I bought the {c} {i}.", "This is the {c} {i}.", "My {c} {i} is here."))
    subject = opening.format(c=rng.choice(COLOURS), i=rng.choice(ITEM_LIST))
    return f"{subject} {' '.join(remarks)}", mood
