"""Packed rows: learned from as if each example were alone, in every family."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM, PreTrainedModel

from chorus.errors import FailedPrecondition
from chorus.trainer.batches import collate
from chorus.trainer.config import TrainConfig
from chorus.trainer.encoded import Encoded
from chorus.trainer.loop import train
from chorus.trainer.metrics import completion_loss
from chorus.trainer.packing import check_honoured, fill, pack
from support import tiny

Change = Callable[..., TrainConfig]

#: Longer than the sliding windows of 12, and of one token less than a row.
LENGTHS = (20, 9, 15, 31, 2)
ROW = 48


def examples() -> list[Encoded]:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, tiny.VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]
    return [Encoded.after_prompt(tuple(row), max(1, len(row) // 2)) for row in rows]


def model_of(family: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(tiny.FAMILIES[family])
    return model.eval()


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def learned_alone(model: PreTrainedModel) -> float:
    """By transformers' own loss, an example at a time."""
    total = 0.0
    for example in examples():
        labels = torch.full((1, len(example.ids)), -100)
        labels[0, list(example.targets)] = torch.tensor([example.ids[i] for i in example.targets])
        output: Any = model(input_ids=torch.tensor([example.ids]), labels=labels)
        loss = output.loss * len(example.targets)
        loss.backward()
        total += float(loss.detach())
    return total


@pytest.mark.parametrize("family", [name for name in tiny.FAMILIES if name != "phi3-longrope"])
def test_loss_and_gradients_are_those_of_each_example_alone(family: str) -> None:
    model = model_of(family)
    want, want_gradients = learned_alone(model), gradients(model)
    rows = pack(examples(), ROW, seed=0)
    assert len(rows) == 2
    loss = completion_loss(model, collate(rows, pad=0))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(want, rel=1e-5)
    found = gradients(model)
    assert found.keys() == want_gradients.keys()
    for name, gradient in want_gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * max(scale, 1.0), msg=name)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family_is_found_to_honour_it(family: str, dtype: torch.dtype) -> None:
    """longrope too, as long as no row outgrows its short frequencies."""
    model = model_of(family)
    check_honoured(model.to(dtype), max_length=24)


def test_longrope_is_refused_where_frequencies_would_change() -> None:
    with pytest.raises(FailedPrecondition, match=r"data\.packing: models of type 'phi3' .*above 24 tokens"):
        check_honoured(model_of("phi3-longrope"), max_length=25)


def test_a_model_that_does_not_heed_positions_is_refused_by_name() -> None:
    """Bloom has no positions; a model that ignores them lets an example see the one before."""
    bloom = BloomForCausalLM(BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=2)).eval()
    with pytest.raises(FailedPrecondition, match=r"data\.packing: models of type 'bloom'"):
        check_honoured(bloom, max_length=64)
    llama = model_of("llama")
    forward = llama.forward

    def deaf(*, position_ids: Tensor, **rest: Any) -> Any:
        return forward(position_ids=torch.arange(position_ids.shape[1])[None], **rest)

    llama.forward = deaf
    with pytest.raises(FailedPrecondition, match="would see the one before it"):
        check_honoured(llama, max_length=64)


@given(st.lists(st.integers(2, 12), min_size=1, max_size=60), st.integers(12, 30), st.integers(0, 3))
def test_rows_hold_each_example_once_within_the_limit(lengths: list[int], limit: int, seed: int) -> None:
    wanted = [Encoded.after_prompt(tuple(range(100 * i, 100 * i + n)), 1) for i, n in enumerate(lengths)]
    rows = pack(wanted, limit, seed)
    pieces = []
    for row in rows:
        assert len(row.ids) <= limit
        for start, end in zip(row.starts, [*row.starts[1:], len(row.ids)], strict=True):
            targets = tuple(position - start for position in row.targets if start <= position < end)
            pieces.append(Encoded(row.ids[start:end], targets))
    assert sorted(pieces, key=lambda piece: piece.ids) == wanted
    assert pack(wanted, limit, seed) == rows
    assert fill(rows, limit) == pytest.approx(sum(lengths) / (len(rows) * limit))
    # At most one row is half empty, or two of them would have been one.
    assert sum(2 * len(row.ids) < limit for row in rows) <= 1


def test_a_packed_run_repeats_counts_rows_and_says_how_full_they_are(changed: Change, tmp_path: Path) -> None:
    config = changed(data={"packing": True, "max_length": 64}, train={"steps": None, "epochs": 2, "batch_size": 2})
    result = train(config, tmp_path / "a")
    assert result.data.train_examples == 16
    assert result.data.train_rows < 10
    assert result.steps == 2 * -(-result.data.train_rows // 2)
    assert result.data.packing is not None
    assert result.data.packing > 0.7
    assert "16 examples in" in (result.data.packed() or "")
    train(config, tmp_path / "b")
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
