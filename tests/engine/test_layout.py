"""How chunks become rows, segments and the second table for sampled rows."""

from chorus.adapters.pool import SlotSegment
from chorus.engine.layout import lay_out
from chorus.engine.messages import Sampling
from chorus.engine.scheduler import Chunk
from chorus.engine.sequence import Sequence


def chunk(slot: int, start: int, count: int, *, samples: bool = True) -> Chunk:
    seq = Sequence(slot, tuple(range(100, 100 + start + count)), Sampling(max_tokens=4), blocks=[slot + 5])
    seq.slot = slot
    return Chunk(seq, start, count, samples)


def test_rows_lie_in_the_order_of_chunks_and_segments_cover_each_adapter_once() -> None:
    chunks = [chunk(-1, 7, 1), chunk(0, 3, 1), chunk(0, 0, 4, samples=False), chunk(2, 2, 3)]
    layout = lay_out(chunks)
    assert layout.token_ids == [107, 103, 100, 101, 102, 103, 102, 103, 104]
    assert layout.positions == [7, 3, 0, 1, 2, 3, 2, 3, 4]
    assert [(r.start, r.end, r.context, r.blocks) for r in layout.rows] == [
        (0, 1, 8, [4]),
        (1, 2, 4, [5]),
        (2, 6, 4, [5]),
        (6, 9, 5, [7]),
    ]
    assert layout.segments == (SlotSegment(1, 6, 0), SlotSegment(6, 9, 2))


def test_chunks_in_any_order_give_one_segment_an_adapter() -> None:
    layout = lay_out([chunk(slot, 3, 1) for slot in (1, -1, 0, 1, 0, 1)])
    assert layout.segments == (SlotSegment(1, 3, 0), SlotSegment(3, 6, 1))
    assert layout.sample_segments == layout.segments


def test_lm_head_sees_the_last_row_of_chunks_that_sample_under_a_table_of_its_own() -> None:
    layout = lay_out([chunk(-1, 7, 1), chunk(0, 3, 1), chunk(0, 0, 4, samples=False), chunk(2, 2, 3)])
    assert layout.sample_rows == [0, 1, 8]
    assert [c.seq.slot for c in layout.sampled] == [-1, 0, 2]
    assert layout.sample_segments == (SlotSegment(1, 2, 0), SlotSegment(2, 3, 2))


def test_a_batch_of_the_base_alone_has_no_segments() -> None:
    layout = lay_out([chunk(-1, 0, 2), chunk(-1, 5, 1)])
    assert layout.segments == layout.sample_segments == ()
    assert layout.slots == set()
