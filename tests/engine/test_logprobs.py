"""Log-probabilities are those of log_softmax over the model's own logits, whatever is asked together."""

import math

import pytest
import torch

from chorus.engine import logprobs
from chorus.engine.logprobs import Logprobs, Wanted, is_finite
from chorus.engine.messages import TokenLogprob


def expected(row: torch.Tensor, token: int, k: int) -> TokenLogprob:
    values = torch.log_softmax(row.float(), -1).tolist()
    ranked = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    return TokenLogprob(values[token], tuple((i, values[i]) for i in ranked))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slice_bytes", [1, 3000, 2**26])
def test_each_row_gives_what_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, slice_bytes: int
) -> None:
    """Rows in any order, some twice, some not; with no, few and 20 likeliest; in one slice and in many."""
    monkeypatch.setattr(logprobs, "SLICE_BYTES", slice_bytes)
    logits = (torch.randn(9, 40, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    wanted = [Wanted(row, token, k) for row, token, k in [(7, 3, 0), (2, 39, 5), (2, 0, 20), (0, 12, 1), (8, 8, 0)]]
    assert Logprobs(logits, wanted).read() == [expected(logits[w.row], w.token, w.top) for w in wanted]


def test_equal_tokens_come_by_id_and_no_more_than_there_are() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0]])
    (four,) = Logprobs(logits, [Wanted(0, 0, 4)]).read()
    assert [token for token, _ in four.top] == [1, 2, 4, 0]
    (all_of_them,) = Logprobs(logits, [Wanted(0, 0, 20)]).read()
    assert [token for token, _ in all_of_them.top] == [1, 2, 4, 0, 3]
    assert sum(math.exp(value) for _, value in all_of_them.top) == pytest.approx(1, abs=1e-6)


def test_a_token_that_the_model_excludes_is_told_so() -> None:
    (entry,) = Logprobs(torch.tensor([[0.0, float("-inf")]]), [Wanted(0, 1, 1)]).read()
    assert entry == TokenLogprob(float("-inf"), ((0, 0.0),))
    assert is_finite([entry])


@pytest.mark.parametrize("bad", [[float("nan"), 0.0], [float("inf"), 0.0], [float("-inf")] * 2])
def test_a_row_that_is_not_finite_is_seen(bad: list[float]) -> None:
    logits = torch.tensor([[1.0, 2.0], bad])
    for token in (0, 1):
        good, broken = Logprobs(logits, [Wanted(0, token, 2), Wanted(1, token, 2)]).read()
        assert is_finite([good])
        assert not is_finite([good, broken])


def test_nothing_asked_is_nothing_done() -> None:
    assert Logprobs(torch.zeros(0, 5), []).read() == []
