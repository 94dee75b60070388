"""What is wrong with a request, gathered so that the caller is told all of it at once."""

from dataclasses import dataclass, field

from chorus.errors import FieldViolation, InvalidArgument

MAX_REQUEST_ID = 128


def is_request_id(text: str) -> bool:
    return len(text) <= MAX_REQUEST_ID and text.isascii() and text.isprintable()


@dataclass(slots=True)
class Findings:
    """Gathers violations; `raise_any` tells them."""

    violations: list[FieldViolation] = field(default_factory=list)

    def require(self, holds: bool, name: str, description: str) -> bool:
        if not holds:
            self.violations.append(FieldViolation(name, description))
        return holds

    def between(self, value: float, low: float, high: float, name: str) -> bool:
        """Fails for NaN and the infinities too."""
        return self.require(low <= value <= high, name, f"must be between {low} and {high}")

    def in_vocabulary(self, largest: int, size: int, name: str) -> bool:
        return self.require(largest < size, name, f"token ids must be below {size}, the size of the vocabulary")

    def request_id(self, request_id: str, name: str = "request_id") -> bool:
        """It goes into logs, so it must not break their lines."""
        known = f"must be at most {MAX_REQUEST_ID} printable ASCII characters"
        return self.require(is_request_id(request_id), name, known)

    def raise_any(self) -> None:
        """Raises InvalidArgument with all violations, if there are any."""
        if not self.violations:
            return
        first = self.violations[0]
        rest = f" (and {len(self.violations) - 1} more)" if len(self.violations) > 1 else ""
        raise InvalidArgument(f"{first.field}: {first.description}{rest}", violations=self.violations)
