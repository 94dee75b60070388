"""`head` on a CPU, against torch's linears and transformers' heads, and what it refuses."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DistilBertConfig, RobertaConfig
from transformers.models.distilbert.modeling_distilbert import DistilBertForSequenceClassification
from transformers.models.roberta.modeling_roberta import RobertaClassificationHead

from chorus.kernels import HeadPlan, HeadPool, HeadSegment, head, reference
from support.heads import ACTIVATIONS, LAYOUTS, Layout, check, exact, make_pool, segments_of
from support.rows import DTYPES, check_close, noise

CPU = torch.device("cpu")
layouts = st.lists(
    st.tuples(st.sampled_from([0, 1, 1, 2, 5, 34]), st.integers(0, 6), st.booleans()), min_size=1, max_size=5
)


@settings(max_examples=60, deadline=None)
@given(
    layout=layouts, width=st.sampled_from([16, 33]), dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(list(ACTIVATIONS)), strided=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_logits_are_those_of_each_rows_own_layers(
    layout: Layout, width: int, dtype: torch.dtype, activation: Any, strided: bool, seed: int
) -> None:
    if dtype is not torch.float32:
        layout = [*layout, (30, 6, True)]  # an RMS of a few roundings means nothing
    check(layout, width, dtype, activation, strided=strided, seed=seed)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_layouts_of_real_batches(layout: Layout, activation: Any) -> None:
    check(layout, 48, torch.float32, activation)


def test_segments_may_share_a_dense_layer() -> None:
    pool, x = make_pool([(1, 2, True), (2, 3, True)], 8, torch.float32, 0), noise(1, 3, 8)
    shared = [dataclasses.replace(s, dense=2) for s in segments_of([(1, 2, True), (2, 3, True)])[0]]
    check_close(head(x, pool, HeadPlan(shared, 3, CPU)), exact(x, pool, shared, 3, "tanh"), torch.float32)


def test_the_specification_is_exact_in_float64() -> None:
    layout = LAYOUTS["both kinds, uneven, rows without between"]
    segments, rows = segments_of(layout)
    pool, x = make_pool(layout, 8, torch.float64, 0), noise(1, rows, 8).double()
    got = reference.head(x, pool, segments, 9)
    torch.testing.assert_close(got, exact(x, pool, segments, 9, "tanh"), rtol=1e-12, atol=1e-12)


def test_robertas_heads_side_by_side() -> None:
    """Three tenants' heads of 2, 3 and 5 labels, a row each."""
    configs = [RobertaConfig(hidden_size=16, id2label=dict(enumerate("abcde"[:n]))) for n in (2, 3, 5)]
    heads = [RobertaClassificationHead(config).eval() for config in configs]
    pool = HeadPool(
        *(torch.cat([getattr(h.out_proj, name).detach() for h in heads]) for name in ("weight", "bias")),
        *(torch.stack([getattr(h.dense, name).detach() for h in heads]) for name in ("weight", "bias")),
    )
    segments = [HeadSegment(0, 1, 0, 2, 0), HeadSegment(1, 2, 2, 3, 1), HeadSegment(2, 3, 5, 5, 2)]
    x = noise(0, 3, 16)
    logits = head(x, pool, HeadPlan(segments, 3, CPU))
    for row, module in enumerate(heads):
        expected = module(x[row][None, None])[0].detach().double()
        check_close(logits[row, : len(expected)], expected, torch.float32)
        assert not logits[row, len(expected) :].any()


def test_distilberts_head() -> None:
    config = DistilBertConfig(
        dim=16, n_heads=2, n_layers=1, hidden_dim=16, vocab_size=20, id2label=dict(enumerate("abc"))
    )
    model = DistilBertForSequenceClassification(config).eval()
    ids = torch.arange(8).view(2, 4)
    with torch.no_grad():
        expected = model(ids).logits.double()
        pooled = model.distilbert(ids).last_hidden_state[:, 0]
    layers = (model.classifier.weight, model.classifier.bias, model.pre_classifier.weight, model.pre_classifier.bias)
    weight, bias, dense, dense_bias = (t.detach() for t in layers)
    pool = HeadPool(weight, bias, dense[None], dense_bias[None])
    check_close(head(pooled, pool, HeadPlan([HeadSegment(0, 2, 0, 3, 0)], 2, CPU), "relu"), expected, torch.float32)


def test_a_row_with_nan_reaches_no_other_row() -> None:
    layout: Layout = [(2, 3, True), (1, 2, True), (1, 4, False), (1, 2, False)]
    segments, rows = segments_of(layout)
    pool, plan = make_pool(layout, 8, torch.float32, 0), HeadPlan(segments, rows, CPU)
    clean = head(noise(0, rows, 8), pool, plan)
    for row in range(rows):
        x = noise(0, rows, 8)
        x[row, 2] = float("nan")
        out = head(x, pool, plan)
        assert out[row].isnan().any()
        others = torch.arange(rows) != row
        assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize(
    ("segments", "says"),
    [
        ([HeadSegment(0, 2, 0, 1), HeadSegment(1, 3, 0, 1)], "segments: .1, 3. overlaps"),
        ([HeadSegment(0, 4, 0, 1)], "segments: they end at row 4, the batch has 3"),
        ([HeadSegment(0, 1, 0, 0)], "has no labels"),
        ([HeadSegment(0, 1, -1, 2)], "has no labels or a negative place"),
        ([HeadSegment(0, 1, 0, 2, -1)], "has no labels or a negative place"),
    ],
)
def test_a_batch_that_makes_no_sense_is_refused(segments: list[HeadSegment], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        HeadPlan(segments, 3, CPU)


@pytest.mark.parametrize(
    ("x", "pool", "says"),
    [
        (torch.zeros(2, 5), {}, "x: want .T, 4."),
        (torch.zeros(1, 4), {}, "x: 1 rows, the plan was made for 2"),
        (torch.zeros(4, 2).T, {}, "x: rows must be contiguous"),
        (torch.zeros(2, 4), {"bias": torch.zeros(2)}, "pool: bias must be"),
        (torch.zeros(2, 4), {"bias": torch.zeros(3).half()}, "pool: bias must be contiguous, torch.float32"),
        (torch.zeros(2, 4), {"dense_weight": torch.zeros(1, 4, 3)}, "pool: dense_weight must be"),
        (torch.zeros(2, 4), {"dense_bias": None}, "pool: dense_weight and dense_bias"),
        (torch.zeros(2, 4), {"dense_weight": None, "dense_bias": None}, "pool: 3 labels and 0 dense layers"),
        (torch.zeros(2, 4), {"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, "pool: 2 labels and 1 dense"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused_by_name(x: torch.Tensor, pool: dict[str, Any], says: str) -> None:
    good = HeadPool(torch.zeros(3, 4), torch.zeros(3), torch.zeros(1, 4, 4), torch.zeros(1, 4))
    plan = HeadPlan([HeadSegment(0, 2, 1, 2, 0)], 2, CPU)
    with pytest.raises(ValueError, match=says):
        head(x, good._replace(**pool), plan)


def test_a_plan_without_a_capacity_is_not_written_anew() -> None:
    with pytest.raises(ValueError, match="capacity"):
        HeadPlan([], 1, CPU).rewrite([], 1)
