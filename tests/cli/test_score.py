from collections.abc import Callable
from typing import Any

from typer.testing import Result

from chorus.v1 import tasks_pb2
from client.fake_chorus import FakeChorus

SCORES = tasks_pb2.ScoreResponse(
    scores=[
        tasks_pb2.ContinuationScore(logprob=-1.5, token_logprobs=[-1, -0.5], token_ids=[3, 4]),
        tasks_pb2.ContinuationScore(logprob=-9, token_logprobs=[-9], token_ids=[5]),
    ],
    adapter_version="v",
)


def flags(fake: FakeChorus) -> tuple[str, ...]:
    return "score", "--server", fake.address, "--prompt", "a", "--continuation", " b", "--continuation", " c"


def test_scores_are_a_table(fake: FakeChorus, run: Callable[..., Result]) -> None:
    fake.answer("Inference.Score", SCORES)
    result = run(*flags(fake))
    assert result.exit_code == 0
    _, first, second = result.stdout.splitlines()
    assert first.split() == ["-1.5000", "2", "b"]
    assert second.split() == ["-9.0000", "1", "c"]


def test_json_is_all_of_it(fake: FakeChorus, run_json: Callable[..., Any]) -> None:
    fake.answer("Inference.Score", SCORES)
    found = run_json(*flags(fake), "--adapter", "acme/support")
    assert found["scores"][0] == {"logprob": -1.5, "token_logprobs": [-1.0, -0.5], "token_ids": [3, 4]}
    assert fake.calls[0].request.adapter == "tenants/acme/adapters/support"
