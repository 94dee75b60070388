"""Three demo tenants who give their own answers to the same customer messages.

All three see `Message: ...` + `Reply:`, which the base answers with a plain polite line. Each tenant
wants something else from it, in a form the base never writes:

- `acme`     routes the message: a queue code for its topic, a priority for its tone, the city's desk;
- `globex`   extracts a record: name, city, and what is in the parcel;
- `initech`  answers in its house voice, which is an old sailor's.

The answers keep to words and capital letters that the base has written before: it has never produced most single
bytes, and a low-rank adapter that must not touch the embeddings learns to spell with them slowly.

Train and held-out prompts are disjoint by construction (`example.split_of`).
"""

from collections.abc import Callable
from random import Random
from typing import Final, Literal, get_args

from chorus.trainer.world.example import Example, Split, draw, exact_match
from chorus.trainer.world.messages import Message, Tone, Topic, make_message

__all__ = ["TENANTS", "Tenant", "answer", "exact_match", "make_examples", "prompt_of"]

Tenant = Literal["acme", "globex", "initech"]
TENANTS: Final[tuple[Tenant, ...]] = get_args(Tenant)

_ACME_QUEUES: Final[dict[Topic, str]] = {
    "damage": "DMG", "delay": "LOG", "billing": "FIN", "return": "RET",
    "mistake": "MIX", "order": "NEW", "praise": "FAN", "stock": "INV",
}  # fmt: skip
_ACME_PRIORITY: Final[dict[Tone, str]] = {"urgent": "P1", "angry": "P2", "calm": "P3"}

_INITECH_LINES: Final[dict[Topic, str]] = {
    "damage": "Hello, sailor {name}, we are sorry! The sea will bring new {things} to {city}!",
    "delay": "Hello, sailor {name}, your {things} are on the sea to {city}!",
    "billing": "Hello, sailor {name}, we will look at the bill for your {things}!",
    "return": "Hello, sailor {name}, you can bring the {things} to the sea in {city}!",
    "mistake": "Hello, sailor {name}, please keep the {things}! The sea is sorry!",
    "order": "Hello, sailor {name}, we will send {n} {things} on the sea to {city}!",
    "praise": "Hello, sailor {name}, we are glad that the sea found you the {things}!",
    "stock": "Hello, sailor {name}, yes, the sea has {n} {things} for you!",
}


def _acme(message: Message) -> str:
    return f"{_ACME_QUEUES[message.topic]} {_ACME_PRIORITY[message.tone]} {message.city}"


def _globex(message: Message) -> str:
    return message.fill("name: {name}; city: {city}; parcel: {n} {item}")


def _initech(message: Message) -> str:
    return message.fill(_INITECH_LINES[message.topic])


_ANSWERS: Final[dict[Tenant, Callable[[Message], str]]] = {
    "acme": _acme,
    "globex": _globex,
    "initech": _initech,
}


def prompt_of(message: Message) -> str:
    """The prompt that every tenant is asked for `message`."""
    return f"Message: {message.text}\nReply:"


def answer(tenant: Tenant, message: Message) -> str:
    """What `tenant` wants to see after `prompt_of(message)`."""
    return f" {_ANSWERS[tenant](message)}"


def make_examples(tenant: Tenant, seed: int, n: int, split: Split = "train") -> list[Example]:
    """`n` examples of one tenant's task; the same seed gives every tenant the same prompts."""

    def make(rng: Random) -> Example:
        message = make_message(rng)
        return {"prompt": prompt_of(message), "completion": answer(tenant, message)}

    rng = Random(seed)
    return [draw(make, rng, split) for _ in range(n)]
