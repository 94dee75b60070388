"""Fault 8: prompts that do not fit the context."""

import pytest

from chorus.client import Client
from chorus.errors import InvalidArgument

CONTEXT = 256


def test_prompt_over_the_context_is_invalid_with_the_limit(client: Client) -> None:
    for length in (CONTEXT, CONTEXT + 1, 100_000):
        with pytest.raises(InvalidArgument, match=rf"{length} tokens.* {CONTEXT} tokens") as error:
            client.generate([5] * length, max_tokens=1)
        assert error.value.reason == "PROMPT_TOO_LONG"
        assert [violation.field for violation in error.value.violations] == ["prompt"]


def test_longest_prompt_leaves_room_for_one_token(client: Client) -> None:
    answer = client.generate([5] * (CONTEXT - 1), max_tokens=10, temperature=0)
    assert len(answer.token_ids) == 1
    assert answer.finish_reason in ("length", "stop")
