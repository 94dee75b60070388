"""What a GenerateRequest may say. Checks every field, reports all that is wrong at once, fills in the defaults.

Ranges and defaults are vLLM's where it has them. What the contract has and the server has not built yet is refused by
name when it would change the result, and accepted where it says what holds anyway (`n` = 1, a penalty of 0).
"""

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from chorus.engine.messages import Sampling
from chorus.errors import FieldViolation, InvalidArgument, Unimplemented
from chorus.models.facts import BaseFacts
from chorus.v1 import generate_pb2

DEFAULT_MAX_TOKENS = 16
MAX_TEMPERATURE = 10
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKENS = 64
MAX_N = 128
MAX_LOGPROBS = 20
MAX_PRIORITY = 100
MAX_REQUEST_ID = 128
MAX_MESSAGES = 1024
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Wish:
    """What the caller asked for, apart from prompt and adapter. `sampling` is not fitted to the prompt yet."""

    sampling: Sampling
    stop: tuple[str, ...]
    priority: int


@dataclass(slots=True)
class Findings:
    """Gathers what is wrong with a request, and what is fine but not built yet."""

    violations: list[FieldViolation] = field(default_factory=list)
    unbuilt: list[str] = field(default_factory=list)

    def require(self, holds: bool, name: str, description: str) -> bool:
        if not holds:
            self.violations.append(FieldViolation(name, description))
        return holds

    def between(self, value: float, low: float, high: float, name: str) -> bool:
        """Fails for NaN and the infinities too."""
        return self.require(low <= value <= high, name, f"must be between {low} and {high}")

    def raise_any(self) -> None:
        """Raises InvalidArgument with all violations, else Unimplemented naming the first field not built yet."""
        if self.violations:
            first = self.violations[0]
            rest = f" (and {len(self.violations) - 1} more)" if len(self.violations) > 1 else ""
            raise InvalidArgument(f"{first.field}: {first.description}{rest}", violations=self.violations)
        if self.unbuilt:
            names = ", ".join(self.unbuilt)
            raise Unimplemented(
                f"not built yet: {names}",
                reason="FIELD_NOT_BUILT",
                violations=[FieldViolation(name, "not built yet; leave it unset") for name in self.unbuilt],
            )


def check_generate(request: generate_pb2.GenerateRequest, facts: BaseFacts) -> Wish:
    """Everything that can be checked without tokenizing and without looking up the adapter.

    Raises:
        InvalidArgument: with one violation for each thing that is wrong.
        Unimplemented: all is well, but a field asks for what is not built yet.
    """
    findings = Findings()
    _check_prompt(request, facts, findings)
    priority = request.priority if request.HasField("priority") else 0
    findings.between(priority, -MAX_PRIORITY, MAX_PRIORITY, "priority")
    check_request_id(request.request_id, "request_id", findings)
    _check_lengths(request.sampling, facts, findings)
    _check_shape(request.sampling, findings)
    _check_stops(request.sampling, facts, findings)
    _check_unbuilt(request.sampling, facts, findings)
    findings.raise_any()
    return Wish(_sampling(request.sampling), tuple(request.sampling.stop), priority)


def fit(sampling: Sampling, prompt_tokens: int, facts: BaseFacts) -> Sampling:
    """Limits `max_tokens` to what the context leaves. Raises InvalidArgument if it leaves nothing."""
    room = facts.context_length - prompt_tokens
    if prompt_tokens == 0:
        raise InvalidArgument("the prompt is empty", field="prompt")
    if room < 1:
        raise prompt_too_long(f"{prompt_tokens} tokens", facts)
    max_tokens = min(sampling.max_tokens, room)
    return replace(sampling, max_tokens=max_tokens, min_tokens=min(sampling.min_tokens, max_tokens))


def prompt_too_long(size: str, facts: BaseFacts) -> InvalidArgument:
    return InvalidArgument(
        f"the prompt has {size}; the context holds {facts.context_length} tokens, "
        "and at least one must be left for the completion",
        reason="PROMPT_TOO_LONG",
        field="prompt",
    )


def _check_prompt(request: generate_pb2.GenerateRequest, facts: BaseFacts, findings: Findings) -> None:
    match request.WhichOneof("prompt"):
        case "text":
            findings.require(bool(request.text), "text", "must not be empty")
        case "token_ids":
            ids = request.token_ids.ids
            if not findings.require(bool(ids), "token_ids.ids", "must not be empty"):
                return
            if len(ids) >= facts.context_length:
                raise prompt_too_long(f"{len(ids)} tokens", facts)
            _in_vocabulary(max(ids), facts, "token_ids.ids", findings)
        case "messages":
            messages = request.messages.messages
            findings.between(len(messages), 1, MAX_MESSAGES, "messages.messages (their number)")
            for i, message in enumerate(messages[:MAX_MESSAGES]):
                known = message.role in ROLES
                if not findings.require(known, f"messages.messages[{i}].role", f"must be one of {', '.join(ROLES)}"):
                    break
            findings.unbuilt.append("messages")
        case _:
            findings.require(False, "prompt", "one of text, token_ids and messages must be set")


def check_request_id(request_id: str, name: str, findings: Findings) -> None:
    """It goes into logs, so it must not break their lines."""
    fine = len(request_id) <= MAX_REQUEST_ID and request_id.isascii() and request_id.isprintable()
    findings.require(fine, name, f"must be at most {MAX_REQUEST_ID} printable ASCII characters")


def _check_lengths(sampling: generate_pb2.SamplingParams, facts: BaseFacts, findings: Findings) -> None:
    max_tokens = sampling.max_tokens if sampling.HasField("max_tokens") else DEFAULT_MAX_TOKENS
    if sampling.HasField("max_tokens"):
        findings.between(max_tokens, 1, facts.context_length, "sampling.max_tokens")
    if sampling.HasField("min_tokens"):
        findings.require(
            0 <= sampling.min_tokens <= max_tokens,
            "sampling.min_tokens",
            f"must be between 0 and max_tokens, which is {max_tokens}",
        )


def _check_shape(sampling: generate_pb2.SamplingParams, findings: Findings) -> None:
    if sampling.HasField("temperature"):
        findings.between(sampling.temperature, 0, MAX_TEMPERATURE, "sampling.temperature")
    if sampling.HasField("top_k"):
        findings.require(sampling.top_k >= -1, "sampling.top_k", "must be at least 1; 0 and -1 turn it off")
    if sampling.HasField("top_p"):
        findings.require(0.0 < sampling.top_p <= 1.0, "sampling.top_p", "must be above 0 and at most 1")
    if sampling.HasField("min_p"):
        findings.between(sampling.min_p, 0, 1, "sampling.min_p")


def _check_stops(sampling: generate_pb2.SamplingParams, facts: BaseFacts, findings: Findings) -> None:
    many = f"must hold at most {MAX_STOP_STRINGS} strings"
    if findings.require(len(sampling.stop) <= MAX_STOP_STRINGS, "sampling.stop", many):
        for i, text in enumerate(sampling.stop):
            findings.require(
                0 < len(text) <= MAX_STOP_CHARS, f"sampling.stop[{i}]", f"must have 1 to {MAX_STOP_CHARS} characters"
            )
    ids = sampling.stop_token_ids
    many = f"must hold at most {MAX_STOP_TOKENS} ids"
    if findings.require(len(ids) <= MAX_STOP_TOKENS, "sampling.stop_token_ids", many) and ids:
        _in_vocabulary(max(ids), facts, "sampling.stop_token_ids", findings)


def _check_unbuilt(sampling: generate_pb2.SamplingParams, facts: BaseFacts, findings: Findings) -> None:
    """Fields that the sampler does not know yet: refused out of range, accepted where neutral, else not built."""

    def scalar(name: str, legal: Callable[[float], bool], neutral: float | None, description: str) -> None:
        if sampling.HasField(name):  # type: ignore[arg-type]
            value = getattr(sampling, name)
            if findings.require(legal(value), f"sampling.{name}", description) and value != neutral:
                findings.unbuilt.append(f"sampling.{name}")

    for name in ("presence_penalty", "frequency_penalty"):
        scalar(name, lambda v: -2.0 <= v <= 2.0, 0.0, "must be between -2 and 2")
    scalar("repetition_penalty", lambda v: 0.0 < v < math.inf, 1.0, "must be above 0 and finite")
    scalar("n", lambda v: 1 <= v <= MAX_N, 1, f"must be between 1 and {MAX_N}")
    for name in ("logprobs", "prompt_logprobs"):
        scalar(name, lambda v: 0 <= v <= MAX_LOGPROBS, None, f"must be between 0 and {MAX_LOGPROBS}")
    bias = sampling.logit_bias
    if bias:
        _in_vocabulary(max(bias), facts, "sampling.logit_bias", findings)
        findings.require(
            all(-100.0 <= v <= 100.0 for v in bias.values()),
            "sampling.logit_bias",
            "values must be between -100 and 100",
        )
        if any(bias.values()):
            findings.unbuilt.append("sampling.logit_bias")


def _in_vocabulary(largest: int, facts: BaseFacts, name: str, findings: Findings) -> None:
    findings.require(
        largest < facts.vocab_size, name, f"token ids must be below {facts.vocab_size}, the size of the vocabulary"
    )


def _sampling(params: generate_pb2.SamplingParams) -> Sampling:
    def given(name: str, default: float) -> float:
        return getattr(params, name) if params.HasField(name) else default  # type: ignore[arg-type]

    return Sampling(
        max_tokens=int(given("max_tokens", DEFAULT_MAX_TOKENS)),
        min_tokens=int(given("min_tokens", 0)),
        temperature=given("temperature", 1.0),
        top_k=max(int(given("top_k", 0)), 0),
        top_p=given("top_p", 1.0),
        min_p=given("min_p", 0.0),
        seed=params.seed if params.HasField("seed") else secrets.randbits(63),
        stop_token_ids=frozenset(params.stop_token_ids),
        ignore_eos=params.ignore_eos,
    )
