"""Steps that are laid out before the one before them has been booked: what is in them, and when there is none."""

from typing import Any

import pytest

from chorus.engine.messages import FinishReason
from chorus.engine.schedule import Schedule
from chorus.engine.sequence import Sequence
from support.scheduling import EOS, TOKEN, A, Bench, work


def decoding(bench: Bench, *requests: dict[str, Any]) -> list[Sequence]:
    """Requests whose prompts have been computed, in one step."""
    added = [bench.add(**request) for request in requests]
    bench.step()
    return added


def launched(bench: Bench) -> tuple[Schedule, Schedule | None]:
    """A step, and the one laid out behind it."""
    schedule = bench.schedule()
    return schedule, bench.scheduler.ahead(schedule, 0.0)


def book(bench: Bench, schedule: Schedule, *tokens: int) -> list[tuple[Sequence, FinishReason | None]]:
    keys = [chunk.seq.key for chunk in schedule.chunks if chunk.samples]
    booked = bench.scheduler.advance(schedule, dict(zip(keys, tokens, strict=True)))
    bench.scheduler.check_integrity()
    return [(seq, finish) for seq, finish in booked]


def test_decodes_go_on_one_token_further() -> None:
    bench = Bench(A)
    decoding(bench, {"prompt": 4}, {"prompt": 6, "adapter": A})
    schedule, following = launched(bench)
    assert work(schedule) == [(1, 4, 1, True), (2, 6, 1, True)]
    assert following is not None
    assert work(following) == [(1, 5, 1, True), (2, 7, 1, True)]
    beyond = bench.scheduler.ahead(following, 0.0)
    assert beyond is None, "the tokens of two steps are not known"


def test_prompts_that_end_in_a_step_decode_in_the_next() -> None:
    bench = Bench()
    bench.add(prompt=4)
    schedule, following = launched(bench)
    assert work(schedule) == [(1, 0, 4, True)]
    assert following is not None
    assert work(following) == [(1, 4, 1, True)]


def test_a_step_behind_one_that_was_laid_out_ahead_is_one_token_further_again() -> None:
    bench = Bench()
    decoding(bench, {"prompt": 4})
    schedule, following = launched(bench)
    assert following is not None
    book(bench, schedule, TOKEN)
    third = bench.scheduler.ahead(following, 0.0)
    assert third is not None
    assert work(third) == [(1, 6, 1, True)]


def test_who_gets_the_last_of_its_tokens_is_not_in_the_next_step_and_has_its_pages_until_then() -> None:
    bench = Bench()
    last, _ = decoding(bench, {"new": 2}, {"new": 9})
    schedule, following = launched(bench)
    assert [chunk.seq.request_id for chunk in schedule.chunks] == [1, 2]
    assert following is not None
    assert [chunk.seq.request_id for chunk in following.chunks] == [2]
    assert last.blocks
    book(bench, schedule, TOKEN, TOKEN)
    assert not last.blocks


def test_nothing_is_laid_out_behind_a_step_in_which_all_get_the_last_of_their_tokens() -> None:
    """An empty step would never be launched, nor end the one before it."""
    bench = Bench()
    decoding(bench, {"new": 2}, {"new": 2})
    schedule, following = launched(bench)
    assert len(schedule.chunks) == 2
    assert following is None


def test_who_ends_by_its_token_leaves_a_row_that_is_passed_over_and_its_pages_at_once() -> None:
    bench = Bench(A)
    ended, other = decoding(bench, {"prompt": 4, "adapter": A}, {"prompt": 4})
    schedule, following = launched(bench)
    assert following is not None
    assert (ended, FinishReason.STOP) in book(bench, schedule, EOS, TOKEN)
    assert bench.used == len(other.blocks)
    assert not +bench.gate.refs
    assert [chunk.seq for chunk in bench.scheduler.still_running(following)] == [other]
    assert book(bench, following, TOKEN, TOKEN) == [(other, None)]


def test_who_is_aborted_between_two_steps_is_passed_over_in_both() -> None:
    bench = Bench()
    decoding(bench, {}, {})
    schedule, following = launched(bench)
    assert following is not None
    bench.scheduler.abort(1)
    assert [seq.request_id for seq, _ in book(bench, schedule, TOKEN, TOKEN)] == [2]
    assert [seq.request_id for seq, _ in book(bench, following, TOKEN, TOKEN)] == [2]


def test_who_is_aborted_while_its_whole_prompt_is_computed_is_passed_over_in_both() -> None:
    bench = Bench()
    bench.add(prompt=4)
    bench.add(prompt=4)
    schedule, following = launched(bench)
    assert following is not None
    bench.scheduler.abort(1)
    assert [seq.request_id for seq, _ in book(bench, schedule, TOKEN, TOKEN)] == [2]
    assert [seq.request_id for seq, _ in book(bench, following, TOKEN, TOKEN)] == [2]


def test_nothing_is_laid_out_ahead_of_one_that_could_join() -> None:
    bench = Bench()
    decoding(bench, {})
    schedule = bench.schedule()
    bench.add()
    assert bench.scheduler.ahead(schedule, 0.0) is None


def test_the_queue_does_not_matter_while_all_rows_are_taken_by_those_no_less_important() -> None:
    bench = Bench(max_rows=2)
    decoding(bench, {}, {"new": 3})
    bench.add()
    schedule, following = launched(bench)
    assert following is not None
    book(bench, schedule, TOKEN, TOKEN)
    assert bench.scheduler.ahead(following, 0.0) is None, "a row gets free"
    bench = Bench(max_rows=2)
    decoding(bench, {}, {})
    schedule = bench.schedule()
    bench.add(priority=-1)
    assert bench.scheduler.ahead(schedule, 0.0) is None, "somebody has to go"


def test_the_queue_does_not_matter_while_its_first_finds_no_room() -> None:
    def bench_of_two_beside_a_long_prompt() -> tuple[Bench, Schedule]:
        bench = Bench(blocks=12, block_size=4)
        decoding(bench, {"prompt": 12}, {"prompt": 12})
        bench.add(prompt=24)
        schedule, following = launched(bench)
        assert following is not None
        book(bench, schedule, TOKEN, TOKEN)
        return bench, following

    bench, schedule = bench_of_two_beside_a_long_prompt()
    assert bench.scheduler.ahead(schedule, 0.0) is not None
    bench, schedule = bench_of_two_beside_a_long_prompt()
    bench.scheduler.abort(1)
    assert bench.scheduler.ahead(schedule, 0.0) is None, "there is room now"
    bench, schedule = bench_of_two_beside_a_long_prompt()
    bench.scheduler.abort(3)
    bench.add(prompt=4)
    assert bench.scheduler.ahead(schedule, 0.0) is None, "somebody else is in turn"


def test_nothing_is_laid_out_ahead_of_a_prompt_under_way() -> None:
    bench = Bench(max_step_tokens=8)
    decoding(bench, {"prompt": 4})
    bench.add(prompt=12)
    schedule, following = launched(bench)
    assert (work(schedule)[-1], following) == ((2, 0, 7, False), None)
    book(bench, schedule, TOKEN)
    schedule, following = launched(bench)
    assert work(schedule)[-1] == (2, 7, 5, True)
    assert following is not None


def test_nothing_is_laid_out_ahead_of_a_prompt_that_wants_no_token() -> None:
    bench = Bench()
    bench.add(prompt=4, new=0)
    assert launched(bench)[1] is None


def test_nothing_is_laid_out_ahead_where_a_block_is_lacking_and_none_is_taken() -> None:
    bench = Bench(blocks=3, block_size=4)
    decoding(bench, {"prompt": 3}, {"prompt": 3})
    schedule, following = launched(bench)
    assert len(schedule.chunks) == 2
    assert following is None
    assert bench.used == 2


def test_nothing_is_laid_out_ahead_of_a_deadline_that_has_passed() -> None:
    bench = Bench()
    decoding(bench, {"deadline": 5.0})
    schedule = bench.schedule(now=4.0)
    assert bench.scheduler.ahead(schedule, 6.0) is None
    assert bench.scheduler.ahead(schedule, 4.5) is not None


@pytest.mark.parametrize(("short", "ahead"), [(5, False), (6, True)])
def test_nothing_is_laid_out_ahead_of_who_has_to_be_computed_anew(short: int, ahead: bool) -> None:
    """With the sixth token, where the short frequencies are those of five."""
    bench = Bench(short_length=short)
    decoding(bench, {"prompt": 4})
    assert (launched(bench)[1] is not None) == ahead
