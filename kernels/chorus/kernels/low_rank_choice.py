"""Which family a static plan of `low_rank` has: one table, each row with its evidence. Nothing of it is measured yet.

A plan of one batch has a family for each segment, by its length (`tuning.FAMILY_RULES`), and as many tiles as it needs.
A static plan has one family, and for each of its rows whatever any batch could need there. What counts is how many
programs that is: one that finds nothing to do still takes a place on an SM, some 0.5 us with its one load. The figures
are a layer of Llama-3-8B at rank 16 on an H200 (`docs/kernels-predictions.md`).
"""

from dataclasses import dataclass

from chorus.kernels.tuning import Family


@dataclass(frozen=True, slots=True)
class CapacityRule:
    """The family of plans for `rows_from` rows or more, whose longest segment has up to `longest_up_to` (None: any)."""

    family: Family
    rows_from: int
    longest_up_to: int | None
    evidence: str


_PREDICTED = "predicted, us a layer: "
CAPACITY_RULES = (
    CapacityRule(Family.ROWS, 1, 2, "predicted: a program a row either way; SLOTS has 8 to 16 adapters in turns"),
    CapacityRule(
        Family.SLOTS, 128, None, _PREDICTED + "128 rows of 16 adapters 48, SMALL 71; 256 of 32 59 and 121, 7 of 8 empty"
    ),
    CapacityRule(
        Family.SMALL, 1, 32, _PREDICTED + "64 rows of 16 adapters 53, SLOTS 61, of too few programs for 132 SMs"
    ),
    CapacityRule(
        Family.SLOTS, 1, None, _PREDICTED + "64 rows of 1 adapter 39, GROUPED 266: a tile of 64 rows each, 1 on an SM"
    ),
)


def capacity_family(rows: int, longest: int) -> Family:
    """The family of a capacity for batches of up to `rows` rows, the longest segment of about `longest`."""
    fitting = (r for r in CAPACITY_RULES if rows >= r.rows_from and longest <= (r.longest_up_to or longest))
    return next(fitting).family
