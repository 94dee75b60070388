"""The project's own small world: text generators for pretraining, tests and the demo's tenants."""

from chorus.trainer.world.corpus import documents, heldout_examples
from chorus.trainer.world.example import Example, Split, exact_match, split_of
from chorus.trainer.world.skills import SKILLS
from chorus.trainer.world.tenants import TENANTS, Tenant, make_examples

__all__ = [
    "SKILLS",
    "TENANTS",
    "Example",
    "Split",
    "Tenant",
    "documents",
    "exact_match",
    "heldout_examples",
    "make_examples",
    "split_of",
]
