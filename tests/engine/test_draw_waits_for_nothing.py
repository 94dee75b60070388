"""What draws tokens on a device is launched without knowing anything of them: it runs on tensors that hold nothing.

Whoever asks a tensor of torch's "meta" device for a number gets an error, as does whoever needs one to know a size. A
copy from the host is refused too, unless nobody waits for it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chorus.engine import filters
from chorus.engine.logprobs import Logprobs, Wanted
from chorus.engine.messages import Sampling
from chorus.engine.sampler import draw
from chorus.engine.sequence import Sequence
from chorus.kernels import filtered_draw

META = torch.device("meta")
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.7},
    "min_p": {"min_p": 0.1},
    "top_p": {"top_p": 0.9},
    "top_k": {"top_k": 40},
    "both": {"top_k": 40, "top_p": 0.9, "min_p": 0.01},
    "logit_bias": {"logit_bias": ((3, 2.0), (4, -1.0))},
    "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.2},
    "min_tokens": {"min_tokens": 9, "stop_token_ids": frozenset({7})},
    "greedy with penalties": {"temperature": 0.0, "repetition_penalty": 1.2},
}


class _NoCopies(TorchDispatchMode):
    """Refuses copies between the host and the device that somebody waits for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        devices = {t.device for t in tree_leaves((args, out)) if isinstance(t, torch.Tensor) and t.dim()}
        if len(devices) > 1 and not kwargs.get("non_blocking"):
            raise RuntimeError(f"{func} waits for the device")
        return out


class _NoNewOnes(TorchFunctionMode):
    """Refuses tensors that are made from numbers right there: copies that the other mode is not asked about."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.tensor and (kwargs or {}).get("device", "cpu") == META:
            raise RuntimeError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def not_waiting() -> Iterator[None]:
    with _NoCopies(), _NoNewOnes():  # type: ignore[no-untyped-call]
        yield


def draw_on_a_device(ways: list[dict[str, Any]]) -> torch.Tensor:
    sequences = [Sequence(i, (1, 2), Sampling(99, seed=i, **way), output=[3]) for i, way in enumerate(ways)]
    logits = torch.empty(len(ways), 500, dtype=torch.bfloat16, device=META)
    with not_waiting():
        return draw(logits, sequences, frozenset({0}), torch.empty(len(ways), dtype=torch.int64, device=META))


@pytest.fixture(autouse=True)
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "filtered_draw", partial(filtered_draw, triton=True))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_no_way_to_draw_reads_from_the_device(way: dict[str, Any]) -> None:
    assert draw_on_a_device([way, way]).shape == (2,)


def test_nor_do_all_of_them_in_one_batch() -> None:
    assert draw_on_a_device([*WAYS.values(), *WAYS.values()]).shape == (2 * len(WAYS),)


@pytest.mark.parametrize("most", [0, 5, 500])
def test_nor_does_whoever_computes_log_probabilities(most: int) -> None:
    logits, tokens = torch.empty(4, 500, device=META), torch.empty(2, dtype=torch.int64, device=META)
    with not_waiting():
        Logprobs(logits, [Wanted(1, 0, most), Wanted(3, 0, 0)], tokens)


def test_a_look_at_the_device_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def looking(weights: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return rest[0] if (weights.sum() > 0).item() else rest[1]

    monkeypatch.setattr(filters, "filtered_draw", looking)
    with pytest.raises(RuntimeError, match="meta"):
        draw_on_a_device([{"top_p": 0.9}])


def test_a_copy_that_is_waited_for_would_be_seen() -> None:
    with pytest.raises(RuntimeError, match="waits"), not_waiting():
        torch.ones(3).to(META)
    with pytest.raises(RuntimeError, match="waits"), not_waiting():
        torch.tensor([1, 2], device=META)
