"""Building requests: what a caller says in Python, as the contract's messages. Does no I/O.

Whatever protobuf can not hold is refused here, by the field's name; ranges are the server's to judge.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypedDict

from chorus.client.names import expand
from chorus.errors import InvalidArgument
from chorus.v1 import generate_pb2, tasks_pb2


class Message(TypedDict):
    """One turn of a dialogue; `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


# A text, token ids, or a dialogue for the chat template.
Prompt: TypeAlias = str | Sequence[int] | Sequence[Message]


class Sampling(TypedDict, total=False):
    """How tokens are drawn, as vLLM means each name; None and absent both leave it to the server."""

    max_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    stop: Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    n: int | None
    logprobs: int | None
    prompt_logprobs: int | None


def build_request(
    prompt: Prompt,
    adapter: str,
    sampling: Mapping[str, Any],
    *,
    priority: int | None = None,
    request_id: str = "",
) -> generate_pb2.GenerateRequest:
    """Builds the message of Generate.

    Raises:
        InvalidArgument: a value of the wrong type or size.
        TypeError: a parameter that is not in `Sampling`.
    """
    unknown = sampling.keys() - Sampling.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown sampling parameters: {', '.join(sorted(unknown))}")
    request = generate_pb2.GenerateRequest()
    _set(request, "adapter", expand(adapter))
    _set_prompt(request, prompt)
    for name, value in sampling.items():
        if value is not None:
            _set(request.sampling, name, value, path=f"sampling.{name}")
    if priority is not None:
        _set(request, "priority", priority)
    _set(request, "request_id", request_id)
    return request


def build_score(
    prompt: str | Sequence[int], continuations: Sequence[str] | Sequence[Sequence[int]], adapter: str, request_id: str
) -> tasks_pb2.ScoreRequest:
    """Builds the message of Score; prompt and continuations are both texts or both token ids.

    Raises:
        InvalidArgument: a value of the wrong type or size, or texts mixed with token ids.
    """
    request = tasks_pb2.ScoreRequest()
    _set(request, "adapter", expand(adapter))
    _set(request, "request_id", request_id)
    if isinstance(continuations, str):
        raise InvalidArgument("continuations: takes a list, not one text", field="continuations")
    if isinstance(prompt, str):
        _set(request, "prompt", prompt)
        _set(request, "continuations", continuations)
        return request
    _set(request, "prompt_token_ids", prompt)
    for index, ids in enumerate(continuations):
        path = f"continuation_token_ids[{index}]"
        _set(request.continuation_token_ids.add(), "ids", ids, path=path)
    return request


def _set_prompt(request: generate_pb2.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        _set(request, "text", prompt)
    elif len(prompt) and isinstance(prompt[0], Mapping):
        for index, message in enumerate(prompt):
            _add_message(request, f"messages[{index}]", message)
    else:
        request.token_ids.SetInParent()
        _set(request.token_ids, "ids", prompt, path="token_ids")


def _add_message(request: generate_pb2.GenerateRequest, path: str, message: object) -> None:
    if not isinstance(message, Mapping) or message.keys() != {"role", "content"}:
        raise InvalidArgument(f"{path}: must hold role and content, nothing else", field=path)
    added = request.messages.messages.add()
    for name, value in message.items():
        _set(added, name, value, path=f"{path}.{name}")


def _set(message: Any, name: str, value: Any, *, path: str | None = None) -> None:
    path = path or name
    target = getattr(message, name)
    try:
        # To Python, true is 1.
        if isinstance(value, bool) and isinstance(target, int | float) and not isinstance(target, bool):
            raise TypeError("takes a number, not true or false")
        if hasattr(target, "extend"):
            if isinstance(value, str):
                raise TypeError("takes a list, not one text")
            target.extend(value)
        elif hasattr(target, "update"):
            target.update(value)
        else:
            setattr(message, name, value)
    except (TypeError, ValueError, AttributeError) as error:
        raise InvalidArgument(f"{path}: {error}", field=path) from None
