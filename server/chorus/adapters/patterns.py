"""Tenants' regular expressions, matched in bounded time.

PEFT configs carry regular expressions (`target_modules`, `exclude_modules`, the keys of `rank_pattern` and
`alpha_pattern`), and Python's `re` backtracks: `(a*)*b` against one module name runs for years, under the GIL, where no
timeout reaches it. Length limits do not help, and refusing nested quantifiers does not either: ten `.*` in a row are
enough, and real exports have five and lookaheads besides.

So `re` only parses. Matching walks the parsed tree with *sets of positions* instead of one position at a time: a node
takes the set of places where it may start and gives the set of places where it may end, as the bits of an integer.
That answers "does it match" exactly as `re` does (captures are not needed), and each step is a few operations on an
integer of as many bits as the name has characters. Steps are counted against a budget that one adapter shares.

Refused by name: back-references, conditionals, atomic groups, possessive quantifiers, flags.
"""

import re
from collections.abc import Callable, Iterator
from re import _parser  # type: ignore[attr-defined]  # the tree that re.compile itself starts from
from re import error as RegexError
from typing import Any

from chorus.adapters.strict_json import quote
from chorus.errors import FailedPrecondition, InvalidArgument

PATTERN_LIMIT = 4096
"""Characters. The regex that unsloth exports for a vision model has about 700."""

STEP_BUDGET = 5_000_000
"""Steps for all patterns of one adapter over all module names: 2 to 5 s of one core, at worst. unsloth's regex over the
882 linear layers of a 126-layer model takes 250,000.
"""

PARSE_STEPS = 10
"""What a character of a pattern costs to parse, in steps: 2 to 6 us against 0.6 us (Python 3.11)."""

NESTING_LIMIT = 50

Node = tuple[Any, Any]
_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_WORD": lambda char: char.isalnum() or char == "_",
}


class Budget:
    """Steps left; shared by the patterns of one adapter."""

    def __init__(self, steps: int = STEP_BUDGET) -> None:
        self._left = steps

    def spend(self, field: str, steps: int = 1) -> None:
        self._left -= steps
        if self._left < 0:
            raise FailedPrecondition(
                f"{field}: matching its patterns takes too long; name the modules in a list instead",
                reason="PATTERN_TOO_COSTLY",
                field=field,
            )


class Pattern:
    """One regular expression; `field` names it in errors.

    Raises:
        InvalidArgument: not a regular expression, or longer than `PATTERN_LIMIT`.
        FailedPrecondition: a construct that is not matched here, or the budget is spent.
    """

    def __init__(self, source: str, field: str, budget: Budget) -> None:
        if len(source) > PATTERN_LIMIT:
            raise InvalidArgument(
                f"{field}: a pattern of {len(source)} characters; the limit is {PATTERN_LIMIT}", field=field
            )
        budget.spend(field, PARSE_STEPS * len(source))
        try:
            tree = _parser.parse(source)
        except (RegexError, OverflowError, RecursionError) as error:
            problem = error.msg if isinstance(error, RegexError) else "too large"
            raise InvalidArgument(
                f"{field}: {quote(source)} is not a regular expression: {problem}", field=field
            ) from None
        self._field = field
        self._budget = budget
        self._tree = tree
        if tree.state.flags != _parser.SRE_FLAG_UNICODE:
            raise self._unsupported("flags")
        self._check(tree)

    def match(self, name: str) -> bool:
        """Whether it matches at the start of `name`, as `re.match`."""
        return self._sequence(self._tree, 1, _Name(name)) != 0

    def fullmatch(self, name: str) -> bool:
        """Whether it matches all of `name`, as `re.fullmatch`."""
        return self._sequence(self._tree, 1, _Name(name)) >> len(name) != 0

    def _unsupported(self, construct: str) -> FailedPrecondition:
        return FailedPrecondition(
            f"{self._field}: {construct} in a regular expression are not supported",
            reason="UNSUPPORTED_PATTERN",
            field=self._field,
        )

    def _check(self, sequence: Any, depth: int = 0) -> None:
        """Refuses what `_step` does not know, before anything is matched."""
        if depth > NESTING_LIMIT:
            raise self._unsupported(f"more than {NESTING_LIMIT} nested groups")
        for op, arg in sequence:
            match str(op):
                case "LITERAL" | "NOT_LITERAL" | "ANY" | "IN" | "AT" | "FAILURE":
                    pass
                case "BRANCH":
                    for branch in arg[1]:
                        self._check(branch, depth + 1)
                case "SUBPATTERN":
                    if arg[1] or arg[2]:
                        raise self._unsupported("flags")
                    self._check(arg[3], depth + 1)
                case "MAX_REPEAT" | "MIN_REPEAT":
                    self._check(arg[2], depth + 1)
                case "ASSERT" | "ASSERT_NOT":
                    low, high = arg[1].getwidth()
                    if arg[0] < 0 and low != high:
                        raise InvalidArgument(
                            f"{self._field}: look-behind requires fixed-width pattern", field=self._field
                        )
                    self._check(arg[1], depth + 1)
                case other:
                    raise self._unsupported(f"{other.lower().replace('_', ' ')} constructs")

    def _sequence(self, sequence: Any, starts: int, name: "_Name") -> int:
        for node in sequence:
            starts = self._step(node, starts, name)
            if not starts:
                break
        return starts

    def _step(self, node: Node, starts: int, name: "_Name") -> int:
        """Where `node` may end if it may start at any of `starts`."""
        self._budget.spend(self._field)
        op, arg = node
        ends = 0  # FAILURE, an empty negative lookahead, ends nowhere
        match str(op):
            case "LITERAL" | "NOT_LITERAL" | "ANY" | "IN":
                ends = (starts & name.places_of(node)) << 1
            case "AT":
                ends = starts & name.anchors[str(arg)]
            case "BRANCH":
                for branch in arg[1]:
                    ends |= self._sequence(branch, starts, name)
            case "SUBPATTERN":
                ends = self._sequence(arg[3], starts, name)
            case "MAX_REPEAT" | "MIN_REPEAT":
                ends = self._repeat(arg, starts, name)
            case "ASSERT":
                ends = self._look(arg, starts, name)
            case "ASSERT_NOT":
                ends = starts & ~self._look(arg, starts, name)
        return ends

    def _repeat(self, repeat: tuple[int, int, Any], starts: int, name: "_Name") -> int:
        low, high, body = repeat
        for _ in range(low):
            self._budget.spend(self._field)
            starts = self._sequence(body, starts, name)
            if not starts:
                return 0
        ends = fresh = starts
        rounds = low
        # A place that was reached before gives nothing new: it was reached in fewer rounds.
        while fresh and rounds < high:
            self._budget.spend(self._field)
            fresh = self._sequence(body, fresh, name) & ~ends
            ends |= fresh
            rounds += 1
        return ends

    def _look(self, look: tuple[int, Any], starts: int, name: "_Name") -> int:
        """Those of `starts` from which the body matches ahead, or before which it does."""
        direction, body = look
        width = body.getwidth()[0] if direction < 0 else 0
        found = 0
        for start in _bits(starts):
            if start < width:
                continue
            ends = self._sequence(body, 1 << (start - width), name)
            if ends >> start & 1 if direction < 0 else ends:
                found |= 1 << start
        return found


class PlainPattern:
    """A pattern without quantifiers, groups or sets but those of `template`: `re` takes linear time over it."""

    def __init__(self, template: str, field: str, budget: Budget) -> None:
        budget.spend(field, PARSE_STEPS * len(template))
        self._compiled = re.compile(template)
        self._field = field
        self._budget = budget

    def match(self, name: str) -> bool:
        """Whether it matches at the start of `name`, as `re.match`."""
        self._budget.spend(self._field)
        return self._compiled.match(name) is not None


class _Name:
    """A module name as sets of places: which characters stand where, and where the anchors hold."""

    def __init__(self, name: str) -> None:
        self._inside = (1 << len(name)) - 1
        self._by_char: dict[str, int] = {}
        for place, char in enumerate(name):
            self._by_char[char] = self._by_char.get(char, 0) | 1 << place
        self._seen: dict[int, int] = {}
        self.anchors = self._anchors(name)

    def places_of(self, node: Node) -> int:
        """The places whose character one single-character node takes."""
        places = self._seen.get(id(node))  # nodes live as long as their pattern, which outlives this name
        if places is None:
            places = self._seen[id(node)] = sum(
                bits for char, bits in self._by_char.items() if _takes(str(node[0]), node[1], char)
            )
        return places

    def _anchors(self, name: str) -> dict[str, int]:
        is_word = _CATEGORIES["CATEGORY_WORD"]
        words = sum(bits for char, bits in self._by_char.items() if is_word(char))
        everywhere = self._inside << 1 | 1
        end = 1 << len(name)
        boundary = (words ^ words << 1) & everywhere
        before_newline = end >> 1 if name.endswith("\n") else 0
        return {
            "AT_BEGINNING": 1,
            "AT_BEGINNING_STRING": 1,
            "AT_END": end | before_newline,
            "AT_END_STRING": end,
            "AT_BOUNDARY": boundary,
            "AT_NON_BOUNDARY": everywhere & ~boundary,
        }


def _takes(op: str, arg: Any, char: str) -> bool:
    match op:
        case "LITERAL":
            return bool(ord(char) == arg)
        case "NOT_LITERAL":
            return bool(ord(char) != arg)
        case "ANY":
            return char != "\n"
        case "RANGE":
            return bool(arg[0] <= ord(char) <= arg[1])
        case "CATEGORY":
            category = str(arg)
            positive = category.replace("_NOT_", "_")
            return _CATEGORIES[positive](char) is (positive == category)
        case _:  # IN
            negated = str(arg[0][0]) == "NEGATE"
            return any(_takes(str(kind), value, char) for kind, value in arg[negated:]) is not negated


def _bits(places: int) -> Iterator[int]:
    while places:
        lowest = places & -places
        yield lowest.bit_length() - 1
        places ^= lowest
