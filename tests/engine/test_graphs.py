"""Which steps are recorded, for which shapes, and what comes of a recording that fails."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from chorus.engine import graphs
from chorus.engine.graphs import SEEN_BEFORE, Shape, StaticStep, StepGraphs, most_with_prompts, shape_of
from chorus.engine.layout import Layout, lay_out
from chorus.engine.messages import Launch, Sampling
from chorus.engine.schedule import Chunk
from chorus.engine.sequence import Sequence
from chorus.kernels import LowRankCapacity, SlotSegment, low_rank_family

ROWS = low_rank_family(2, 1)


class Pool:
    """What shapes are made of: adapters of rank 8 and 40 in slots 0 and 1, of an embedding in 2."""

    linears_used = ("q", "v")

    def rank_of(self, slot: int) -> int:
        return (8, 40, 8)[slot]

    def embeds(self, slot: int) -> bool:
        return slot == 2


POOL: Any = Pool()


def prompt(request: int, length: int) -> Chunk:
    seq = Sequence(request, tuple(range(length)), Sampling(max_tokens=4))
    seq.blocks = list(range(-(-length // 16)))
    return Chunk(seq, 0, length, samples=True)


def layout(*rows: tuple[int, int], prompt: int = 0, behind: int = 0, scored: bool = False) -> Layout:
    """Decodes of (context, slot), and a prompt's last chunk of so many tokens, with so many before it."""
    chunks = []
    for i, (context, slot) in enumerate(rows):
        seq = Sequence(i, tuple(range(context)), Sampling(max_tokens=4), computed=context - 1, slot=slot)
        seq.blocks = list(range(-(-context // 16)))
        chunks.append(Chunk(seq, context - 1, 1, samples=True))
    if prompt:
        length = behind + prompt
        seq = Sequence(
            99, tuple(range(length)), Sampling(max_tokens=4, prompt_logprobs=0 if scored else None), computed=behind
        )
        seq.blocks = list(range(-(-length // 16)))
        chunks.append(Chunk(seq, behind, prompt, samples=True))
    return lay_out(chunks)


@pytest.mark.parametrize(
    ("rows", "shape"),
    [
        ([(1, -1)], (1, 1)),
        ([(1, -1)] * 3, (4, 4)),
        ([(1, -1)] * 9, (16, 16)),
        ([(1, -1)] * 17, (24, 24)),
        ([(512, -1)], (1, 1)),
        ([(513, -1)], (1, 2)),
        ([(5000, -1), (1, -1), (1, -1)], (4, 16)),
    ],
)
def test_a_shape_is_the_smallest_that_holds_the_batch(rows: list[tuple[int, int]], shape: tuple[int, int]) -> None:
    size, ranges = shape
    assert shape_of(layout(*rows), POOL) == Shape(size, 0, ranges, None, 0)


@pytest.mark.parametrize(
    ("rows", "capacity"),
    [
        ([(9, 0), (9, -1)], LowRankCapacity(2, 16, ROWS)),
        ([(9, 0), (9, 1)], LowRankCapacity(2, 64, ROWS)),
        ([(9, 0)] * 3, LowRankCapacity(4, 16, low_rank_family(4, 3))),
    ],
    ids=["one adapter", "the larger rank", "rows of one adapter"],
)
def test_a_batch_with_adapters_has_another_shape(rows: list[tuple[int, int]], capacity: LowRankCapacity) -> None:
    shape = shape_of(layout(*rows), POOL)
    assert isinstance(shape, Shape)
    assert (shape.low_rank, shape.linears) == (capacity, 2)


@pytest.mark.parametrize(
    ("decodes", "prompt", "shape"),
    [
        (0, 7, (8, 1, 8)),
        (1, 7, (8, 2, 8)),
        (3, 5, (8, 4, 8)),
        (5, 3, (8, 8, 8)),
        (5, 20, (32, 8, 32)),
        (16, 48, (64, 32, 64)),
        (7, 2, (16, 8, 16)),
    ],
)
def test_tokens_of_prompts_are_rows_of_which_few_have_logits(
    decodes: int, prompt: int, shape: tuple[int, int, int]
) -> None:
    assert shape_of(layout(*[(9, -1)] * decodes, prompt=prompt), POOL) == Shape(*shape, None, 0)


def test_a_prompts_tokens_see_all_that_lies_before_them() -> None:
    """15 of 600 tokens: 13 see more than the 512 of a range, as the decode does."""
    shape = shape_of(layout((600, -1), prompt=15, behind=510), POOL)
    assert isinstance(shape, Shape)
    assert (shape.rows, shape.ranges) == (16, 32)


def test_what_is_much_or_asks_for_more_has_no_shape() -> None:
    assert shape_of(lay_out([]), POOL) is Launch.PROMPT
    assert isinstance(shape_of(layout((9, -1), prompt=63), POOL), Shape)
    assert shape_of(layout((9, -1), prompt=64), POOL) is Launch.PROMPT
    assert isinstance(shape_of(layout((9, -1), prompt=32, behind=480), POOL), Shape)
    assert shape_of(layout((9, -1), prompt=32, behind=481), POOL) is Launch.PROMPT
    assert shape_of(layout((9, -1), prompt=7, scored=True), POOL) is Launch.PROMPT


def test_of_a_small_base_more_tokens_of_prompts_are_recorded() -> None:
    assert most_with_prompts(2_700_000) == 256
    assert most_with_prompts(90_000_000) == 100
    assert most_with_prompts(144_000_000) == most_with_prompts(8_000_000_000) == 64
    assert shape_of(layout((9, -1), prompt=70), POOL, 256) == Shape(80, 2, 80, None, 0)
    two = [prompt(i, 120) for i in range(2)]
    assert shape_of(lay_out(two), POOL, 256) == Shape(240, 2, 240, None, 0)
    assert shape_of(lay_out(two), POOL, 239) is Launch.PROMPT
    assert shape_of(layout((9, -1), prompt=129), POOL, 256) is Launch.PROMPT  # each token reads all before it


def test_an_adapter_that_embeds_has_no_shape() -> None:
    assert shape_of(layout((9, 2)), POOL) is Launch.ADAPTER
    assert shape_of(layout((9, 2), (9, -1), prompt=2), POOL) is Launch.ADAPTER


class Recorded:
    """Graphs whose steps and recordings only say that they were there."""

    def __init__(self, record: Callable[[Callable[[], Tensor]], Callable[[], Tensor]]) -> None:
        self.written: list[tuple[SlotSegment, ...]] = []
        self.made: list[Shape] = []
        self.graphs = StepGraphs(record, lambda _: torch.zeros(0), self.step, POOL)

    def step(self, shape: Shape) -> Any:
        self.made.append(shape)
        return self

    def write(self, layout: Layout, is_long: object, drawn: object = None) -> None:
        self.written.append(layout.segments)

    def run(self, layout: Layout) -> Tensor | None:
        return self.graphs.run(layout, [False] * len(layout.rows))


def ones(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return lambda: torch.ones(8, 2)


def test_a_shape_is_recorded_once_it_has_come_back_often_enough_and_replayed_from_then_on() -> None:
    recorded = Recorded(ones)
    batch = layout((9, -1), (9, -1), (9, -1))
    assert [recorded.run(batch) for _ in range(SEEN_BEFORE)] == [None] * SEEN_BEFORE
    for _ in range(3):
        logits = recorded.run(batch)
        assert logits is not None
        assert logits.shape == (3, 2)
    assert recorded.made == [Shape(4, 0, 4, None, 0)]
    assert len(recorded.written) == 1 + 3
    assert recorded.graphs.take_launches() == {Launch.RARE: SEEN_BEFORE, Launch.RECORDED: 1, Launch.GRAPH: 2}
    assert recorded.graphs.held == 1


def test_what_can_not_be_recorded_is_said_once_and_computed_without(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        raise RuntimeError("an operator waits for the device")

    recorded = Recorded(refuse)
    assert [recorded.run(layout((9, -1))) for _ in range(SEEN_BEFORE + 3)] == [None] * (SEEN_BEFORE + 3)
    assert len(recorded.made) == 1
    assert recorded.graphs.take_launches() == {Launch.RARE: SEEN_BEFORE, Launch.FAILED: 3}
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == ["no graph of steps"]


def test_the_shape_that_was_replayed_longest_ago_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """And has to come as often again: shapes that take turns are not recorded every time."""
    monkeypatch.setattr(graphs, "KEPT", 2)
    recorded = Recorded(ones)
    one, two, four = (layout(*[(1, -1)] * rows) for rows in (1, 2, 4))
    for batch in (one, two, one, four):
        for _ in range(SEEN_BEFORE + 1):
            recorded.run(batch)
    assert [shape.rows for shape in recorded.made] == [1, 2, 4]
    recorded.run(one)
    assert [recorded.run(two) for _ in range(SEEN_BEFORE)] == [None] * SEEN_BEFORE
    assert [shape.rows for shape in recorded.made] == [1, 2, 4]
    recorded.run(two)
    assert [shape.rows for shape in recorded.made] == [1, 2, 4, 2]
    assert recorded.graphs.held == 2


def test_what_has_come_is_rehearsed_the_most_frequent_first_and_replayed_when_it_comes_again() -> None:
    recorded = Recorded(ones)
    once, twice, thrice = (layout(*[(9, -1)] * rows) for rows in (1, 2, 4))
    assert not recorded.graphs.can_rehearse
    for batch in (once, twice, twice, thrice, thrice, thrice):
        assert recorded.run(batch) is None
    assert recorded.graphs.can_rehearse
    assert [recorded.graphs.rehearse() for _ in range(3)] == [True, True, False]
    assert [shape.rows for shape in recorded.made] == [4, 2]
    assert recorded.written == []  # of rows that nobody asked for
    assert not recorded.graphs.can_rehearse
    recorded.graphs.take_launches()
    assert recorded.run(twice) is not None
    assert recorded.graphs.take_launches() == {Launch.GRAPH: 1}


def test_what_only_was_rehearsed_makes_room_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "KEPT", 2)
    recorded = Recorded(ones)
    one, two, four = (layout(*[(9, -1)] * rows) for rows in (1, 2, 4))
    for batch in [one] * (SEEN_BEFORE + 1) + [two] * 2:
        recorded.run(batch)
    recorded.graphs.rehearse()
    for batch in [four] * (SEEN_BEFORE + 1) + [one]:
        recorded.run(batch)
    assert [shape.rows for shape in recorded.made] == [1, 2, 4]
    assert recorded.graphs.held == 2


def test_a_shape_of_fewer_sites_than_adapters_act_at_by_now_is_not_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(ones)
    for _ in range(2):
        recorded.run(layout((9, 0)))
    assert recorded.graphs.can_rehearse
    monkeypatch.setattr(POOL, "linears_used", ("q", "v", "up"), raising=False)
    assert not recorded.graphs.can_rehearse


def test_a_rehearsal_takes_no_place_from_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "KEPT", 1)
    recorded = Recorded(ones)
    for rows in (1, 1, 1, 2, 2):
        recorded.run(layout(*[(9, -1)] * rows))
    recorded.graphs.rehearse()
    assert not recorded.graphs.can_rehearse
    assert not recorded.graphs.rehearse()
    assert [shape.rows for shape in recorded.made] == [1]


@pytest.mark.parametrize("error", [RuntimeError("an operator waits for the device"), ValueError("no such kernel")])
@pytest.mark.parametrize("where", ["record", "step"])
def test_what_can_not_be_rehearsed_is_not_tried_again(
    error: Exception, where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is wrong: nobody asked for it."""

    def fail(*_: object) -> Any:
        raise error

    recorded = Recorded(fail if where == "record" else ones)
    if where == "step":
        monkeypatch.setattr(recorded.graphs, "_new_step", fail)
    for _ in range(2):
        recorded.run(layout((9, -1)))
    recorded.graphs.rehearse()
    assert not recorded.graphs.can_rehearse
    recorded.run(layout((9, -1)))
    assert not recorded.graphs.can_rehearse
    assert recorded.graphs.take_launches() == {Launch.RARE: 2, Launch.FAILED: 1}
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == ["no graph of steps"]


def test_launches_are_taken_once() -> None:
    recorded = Recorded(ones)
    recorded.run(layout((9, -1), prompt=70))
    recorded.run(layout((9, 2)))
    assert recorded.graphs.take_launches() == {Launch.PROMPT: 1, Launch.ADAPTER: 1}
    assert recorded.graphs.take_launches() == {}


def test_a_recorded_step_is_written_anew_with_nothing_left_of_the_batch_before() -> None:
    step = StaticStep(Shape(4, 0, 4, None, 0), POOL, (), block_size=16, scratch_block=9, device=torch.device("cpu"))
    step.write(layout(*[(3, -1)] * 4), [True] * 4)
    assert step.positions.tolist() == [2, 2, 2, 2]
    step.write(layout((5, -1)), [False])
    assert step.token_ids.tolist() == step.positions.tolist() == [4, 0, 0, 0]
    assert step.is_long.tolist() == [0, 0, 0, 0]
    for rows, is_long in ((5, 5), (4, 5)):
        with pytest.raises(ValueError, match="rows: 5, and the shape has 4"):
            step.write(layout(*[(3, -1)] * rows), [False] * is_long)
