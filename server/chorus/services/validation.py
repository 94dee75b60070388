"""What a request may say. Checks every field, reports all that is wrong at once, fills in the defaults.

`sampling` holds SamplingParams' part. Whether names exist, and what text becomes in tokens, is not known here.
"""

from dataclasses import dataclass

from msgspec.structs import replace

from chorus.engine.messages import Sampling
from chorus.errors import InvalidArgument
from chorus.models.facts import BaseFacts
from chorus.services.findings import Findings
from chorus.services.sampling import MAX_N, check_sampling, outputs_of, sampling_of
from chorus.v1 import generate_pb2, tasks_pb2

MAX_PRIORITY = 100
MAX_MESSAGES = 1024
MAX_CONTINUATIONS = 128
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Wish:
    """What the caller asked for, apart from prompt and adapter. `sampling` is not fitted to the prompt yet."""

    sampling: Sampling
    stop: tuple[str, ...]
    priority: int
    n: int


def check_generate(request: generate_pb2.GenerateRequest, facts: BaseFacts, max_n: int = MAX_N) -> Wish:
    """Everything that can be checked without tokenizing and without looking up the adapter.

    Raises:
        InvalidArgument: with one violation for each thing that is wrong.
    """
    findings = Findings()
    _check_prompt(request, facts, findings)
    priority = request.priority if request.HasField("priority") else 0
    findings.between(priority, -MAX_PRIORITY, MAX_PRIORITY, "priority")
    findings.request_id(request.request_id)
    check_sampling(request.sampling, facts, max_n, findings)
    findings.raise_any()
    sampling = request.sampling
    return Wish(sampling_of(sampling), tuple(sampling.stop), priority, outputs_of(sampling))


def check_score(request: tasks_pb2.ScoreRequest, facts: BaseFacts) -> None:
    """Everything of a ScoreRequest that can be checked without tokenizing and without looking up the adapter.

    Raises:
        InvalidArgument: with one violation for each thing that is wrong.
    """
    findings = Findings()
    findings.request_id(request.request_id)
    text = bool(request.prompt or request.continuations)
    ids = bool(request.prompt_token_ids or request.continuation_token_ids)
    either = "give either prompt and continuations, or prompt_token_ids and continuation_token_ids"
    if findings.require(text != ids, "prompt_token_ids" if ids else "prompt", either):
        if text:
            findings.require(bool(request.prompt), "prompt", "must not be empty")
            _check_continuations([*map(bool, request.continuations)], "continuations", findings)
        else:
            _check_score_ids(request, facts, findings)
    findings.raise_any()


def fit(sampling: Sampling, prompt_tokens: int, facts: BaseFacts) -> Sampling:
    """Limits `max_tokens` to what the context leaves. Raises InvalidArgument if it leaves nothing."""
    room = facts.context_length - prompt_tokens
    if prompt_tokens == 0:
        raise InvalidArgument("the prompt is empty", field="prompt")
    if room < 1:
        raise prompt_too_long(f"{prompt_tokens} tokens", facts)
    max_tokens = min(sampling.max_tokens, room)
    return replace(sampling, max_tokens=max_tokens, min_tokens=min(sampling.min_tokens, max_tokens))


def check_fits(prompt_tokens: int, continuation_tokens: int, index: int, facts: BaseFacts) -> None:
    """Raises InvalidArgument where prompt and continuation together are longer than the context, or one is empty."""
    if prompt_tokens == 0:
        raise InvalidArgument("prompt: has no tokens", field="prompt")
    name = f"continuations[{index}]"
    if continuation_tokens == 0:
        raise InvalidArgument(f"{name}: has no tokens", field=name)
    if prompt_tokens + continuation_tokens > facts.context_length:
        raise InvalidArgument(
            f"{name}: prompt and continuation have {prompt_tokens} + {continuation_tokens} tokens; "
            f"the context holds {facts.context_length}",
            reason="PROMPT_TOO_LONG",
            field=name,
        )


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
            findings.in_vocabulary(max(ids), facts.vocab_size, "token_ids.ids")
        case "messages":
            _check_messages(request.messages, findings)
        case _:
            findings.require(False, "prompt", "one of text, token_ids and messages must be set")


def _check_messages(dialogue: generate_pb2.Messages, findings: Findings) -> None:
    messages = dialogue.messages
    if not findings.require(
        1 <= len(messages) <= MAX_MESSAGES, "messages.messages", f"must hold 1 to {MAX_MESSAGES} messages"
    ):
        return
    for i, message in enumerate(messages):
        known = f"must be one of {', '.join(ROLES)}"
        if not findings.require(message.role in ROLES, f"messages.messages[{i}].role", known):
            break


def _check_score_ids(request: tasks_pb2.ScoreRequest, facts: BaseFacts, findings: Findings) -> None:
    prompt, continuations = request.prompt_token_ids, request.continuation_token_ids
    if findings.require(bool(prompt), "prompt_token_ids", "must not be empty"):
        findings.in_vocabulary(max(prompt), facts.vocab_size, "prompt_token_ids")
    name = "continuation_token_ids"
    if _check_continuations([bool(continuation.ids) for continuation in continuations], name, findings):
        largest = max(max(continuation.ids) for continuation in continuations)
        findings.in_vocabulary(largest, facts.vocab_size, name)


def _check_continuations(filled: list[bool], name: str, findings: Findings) -> bool:
    """Whether there are as many as may be, and none is empty."""
    many = f"must hold 1 to {MAX_CONTINUATIONS}"
    if not findings.require(1 <= len(filled) <= MAX_CONTINUATIONS, name, many):
        return False
    empty = [i for i, has_any in enumerate(filled) if not has_any]
    for i in empty:
        findings.require(False, f"{name}[{i}]", "must not be empty")
    return not empty
