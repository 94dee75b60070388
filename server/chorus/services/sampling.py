"""What SamplingParams may say: every field with its limits, and the domain's Sampling with every default filled in.

Ranges and defaults are vLLM's where it has them. Each description says the limit, and where it is not obvious, the
value that turns the field off.
"""

import math
import secrets

from chorus.engine.messages import Sampling
from chorus.models.facts import BaseFacts
from chorus.services.findings import Findings
from chorus.v1 import generate_pb2

DEFAULT_MAX_TOKENS = 16
MAX_TEMPERATURE = 10
MAX_PENALTY = 2
MAX_BIAS = 100
MAX_BIASED_TOKENS = 1024
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKENS = 64
MAX_N = 128

Params = generate_pb2.SamplingParams


def check_sampling(params: Params, facts: BaseFacts, max_n: int, findings: Findings) -> None:
    """Adds all that is wrong with the parameters to `findings`."""
    _check_lengths(params, facts, findings)
    _check_shape(params, findings)
    _check_penalties(params, findings)
    _check_bias(params, facts, findings)
    _check_stops(params, facts, findings)
    if params.HasField("n"):
        findings.between(params.n, 1, max_n, "sampling.n")
    if params.HasField("logprobs"):
        findings.between(params.logprobs, 0, MAX_LOGPROBS, "sampling.logprobs")
    if params.HasField("prompt_logprobs"):
        findings.between(params.prompt_logprobs, 0, MAX_LOGPROBS, "sampling.prompt_logprobs")


def sampling_of(params: Params) -> Sampling:
    """Checked parameters as the engine takes them. An unset seed is drawn here."""

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
        presence_penalty=given("presence_penalty", 0.0),
        frequency_penalty=given("frequency_penalty", 0.0),
        repetition_penalty=given("repetition_penalty", 1.0),
        logit_bias=tuple(sorted((token, bias) for token, bias in params.logit_bias.items() if bias)),
        logprobs=params.logprobs if params.HasField("logprobs") else None,
        prompt_logprobs=params.prompt_logprobs if params.HasField("prompt_logprobs") else None,
    )


def outputs_of(params: Params) -> int:
    """How many completions are asked for."""
    return params.n if params.HasField("n") else 1


def _check_lengths(params: Params, facts: BaseFacts, findings: Findings) -> None:
    max_tokens = params.max_tokens if params.HasField("max_tokens") else DEFAULT_MAX_TOKENS
    if params.HasField("max_tokens"):
        findings.between(max_tokens, 1, facts.context_length, "sampling.max_tokens")
    if params.HasField("min_tokens"):
        limit = f"must be between 0 and max_tokens, which is {max_tokens}"
        findings.require(0 <= params.min_tokens <= max_tokens, "sampling.min_tokens", limit)


def _check_shape(params: Params, findings: Findings) -> None:
    if params.HasField("temperature"):
        findings.between(params.temperature, 0, MAX_TEMPERATURE, "sampling.temperature")
    if params.HasField("top_k"):
        findings.require(params.top_k >= -1, "sampling.top_k", "must be at least 1; 0 and -1 turn it off")
    if params.HasField("top_p"):
        findings.require(0.0 < params.top_p <= 1.0, "sampling.top_p", "must be above 0 and at most 1; 1 turns it off")
    if params.HasField("min_p"):
        findings.between(params.min_p, 0, 1, "sampling.min_p")


def _check_penalties(params: Params, findings: Findings) -> None:
    if params.HasField("presence_penalty"):
        findings.between(params.presence_penalty, -MAX_PENALTY, MAX_PENALTY, "sampling.presence_penalty")
    if params.HasField("frequency_penalty"):
        findings.between(params.frequency_penalty, -MAX_PENALTY, MAX_PENALTY, "sampling.frequency_penalty")
    if params.HasField("repetition_penalty"):
        fine = 0.0 < params.repetition_penalty < math.inf
        findings.require(fine, "sampling.repetition_penalty", "must be above 0 and finite; 1 turns it off")


def _check_bias(params: Params, facts: BaseFacts, findings: Findings) -> None:
    bias = params.logit_bias
    if not bias:
        return
    name = "sampling.logit_bias"
    many = f"must hold at most {MAX_BIASED_TOKENS} tokens"
    if not findings.require(len(bias) <= MAX_BIASED_TOKENS, name, many):
        return
    findings.in_vocabulary(max(bias), facts.vocab_size, name)
    fine = all(-MAX_BIAS <= value <= MAX_BIAS for value in bias.values())
    findings.require(fine, name, f"values must be between -{MAX_BIAS} and {MAX_BIAS}")


def _check_stops(params: Params, facts: BaseFacts, findings: Findings) -> None:
    many = f"must hold at most {MAX_STOP_STRINGS} strings"
    if findings.require(len(params.stop) <= MAX_STOP_STRINGS, "sampling.stop", many):
        for i, text in enumerate(params.stop):
            length = f"must have 1 to {MAX_STOP_CHARS} characters"
            findings.require(0 < len(text) <= MAX_STOP_CHARS, f"sampling.stop[{i}]", length)
    ids = params.stop_token_ids
    many = f"must hold at most {MAX_STOP_TOKENS} ids"
    if findings.require(len(ids) <= MAX_STOP_TOKENS, "sampling.stop_token_ids", many) and ids:
        findings.in_vocabulary(max(ids), facts.vocab_size, "sampling.stop_token_ids")
