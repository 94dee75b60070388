"""How chunks become rows, segments and the second table for the rows whose logits are computed."""

from chorus.engine.layout import Scored, lay_out
from chorus.engine.messages import Sampling, TokenLogprob
from chorus.engine.schedule import Chunk
from chorus.engine.sequence import Sequence
from chorus.kernels import SlotSegment


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
    assert layout.logit_segments == layout.segments


def test_lm_head_sees_the_last_row_of_chunks_that_sample_under_a_table_of_its_own() -> None:
    layout = lay_out([chunk(-1, 7, 1), chunk(0, 3, 1), chunk(0, 0, 4, samples=False), chunk(2, 2, 3)])
    assert layout.logit_rows == [0, 1, 8]
    assert [c.seq.slot for c in layout.sampled] == [-1, 0, 2]
    assert layout.sampled_at == [0, 1, 2]
    assert layout.logit_segments == (SlotSegment(1, 2, 0), SlotSegment(2, 3, 2))
    assert layout.scored == []


def test_a_batch_of_the_base_alone_has_no_segments() -> None:
    layout = lay_out([chunk(-1, 0, 2), chunk(-1, 5, 1)])
    assert layout.segments == layout.logit_segments == ()


def scoring(slot: int, start: int, count: int, *, told: int = 0, told_from: int = 1, prompt: int = 9) -> Chunk:
    """A chunk of a prompt 100, 101, ... whose log-probabilities are asked for; `told` of them are known already."""
    sampling = Sampling(max_tokens=4, prompt_logprobs=0, prompt_logprobs_from=told_from)
    seq = Sequence(slot, tuple(range(100, 100 + prompt)), sampling, blocks=[slot + 5], slot=slot)
    seq.prompt_logprobs = [TokenLogprob(-1.0)] * told
    return Chunk(seq, start, count, samples=start + count == prompt)


def test_rows_that_score_the_prompt_are_under_the_second_table_beside_those_that_are_sampled() -> None:
    decode, whole, later, silent = chunk(0, 5, 1), scoring(0, 0, 9), scoring(1, 3, 4, told=3), chunk(2, 0, 3)
    layout = lay_out([decode, whole, later, silent])
    assert layout.logit_rows == [0, *range(1, 9), 9, *range(10, 14), 16]
    assert layout.logit_segments == (SlotSegment(0, 10, 0), SlotSegment(10, 14, 1), SlotSegment(14, 15, 2))
    assert (layout.sampled, layout.sampled_at) == ([decode, whole, silent], [0, 9, 14])
    assert layout.scored == [Scored(whole.seq, 1, range(8)), Scored(later.seq, 10, range(3, 7))]
    assert [scored.tokens for scored in layout.scored] == [tuple(range(101, 109)), (104, 105, 106, 107)]


def test_an_adapter_without_logits_has_no_segment_there() -> None:
    layout = lay_out([chunk(0, 0, 4, samples=False), scoring(1, 0, 4, told_from=6), chunk(2, 3, 1)])
    assert layout.segments == (SlotSegment(0, 4, 0), SlotSegment(4, 8, 1), SlotSegment(8, 9, 2))
    assert layout.logit_segments == (SlotSegment(0, 1, 2),)


def test_only_what_is_asked_for_and_not_known_yet_is_scored() -> None:
    """The first token has nothing before it; a chunk that is computed again after a preemption tells nothing twice."""
    assert lay_out([scoring(0, 0, 4, told_from=3)]).scored[0].tokens == (103, 104)
    assert lay_out([scoring(0, 0, 4, told=4)]).scored == []
    assert lay_out([scoring(0, 0, 6, told=4)]).scored[0].tokens == (105, 106)
    assert lay_out([scoring(0, 8, 1, told=8)]).scored == []
