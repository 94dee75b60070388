"""Pages of the KV cache: free or counted by their owners, never lost, and as many as the tokens need."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.engine.kv_cache import BlockPool
from chorus.engine.messages import Sampling
from chorus.engine.sequence import Sequence


def sequence(request_id: int, length: int, index: int = 0) -> Sequence:
    return Sequence(request_id, tuple(range(length)), Sampling(max_tokens=1), index=index)


KEYS = [b"0", b"1"]


def kept(pool: BlockPool, length: int, keys: list[bytes] = KEYS) -> Sequence:
    """A sequence that has its tokens in the cache, but for the last one; its full pages are found by `keys`."""
    seq = sequence(1, length)
    assert pool.allocate_for(seq, length)
    seq.computed = length - 1
    seq.page_keys += keys
    for block, key in zip(seq.blocks, keys, strict=False):
        pool.keep(block, key)
    return seq


def share(pool: BlockPool, seq: Sequence) -> None:
    seq.page_keys += KEYS
    pool.share(seq, pool.find(KEYS))


@given(
    blocks=st.integers(1, 12),
    block_size=st.integers(1, 5),
    calls=st.lists(st.tuples(st.integers(0, 3), st.none() | st.integers(0, 40)), max_size=40),
)
def test_any_allocations_and_frees_keep_every_block_owned_once(
    blocks: int, block_size: int, calls: list[tuple[int, int | None]]
) -> None:
    pool = BlockPool(blocks, block_size)
    live = [sequence(i, 40) for i in range(4)]
    for owner, length in calls:
        seq = live[owner]
        held, free = list(seq.blocks), pool.free_count
        if length is None:
            pool.free(seq)
            assert pool.free_count == free + len(held)
        else:
            missing = max(pool.blocks_for(length) - len(held), 0)
            assert pool.allocate_for(seq, length) == (missing <= free)
            assert seq.blocks[: len(held)] == held
            assert len(seq.blocks) == len(held) + (missing if missing <= free else 0)
        pool.check_integrity(live)
        assert pool.usage == pytest.approx(sum(len(s.blocks) for s in live) / blocks)


def test_a_refused_allocation_takes_nothing() -> None:
    pool = BlockPool(num_blocks=2, block_size=4)
    seq = sequence(1, 12)
    assert pool.allocate_for(seq, 4)
    assert not pool.allocate_for(seq, 9 + 4)
    assert (len(seq.blocks), pool.free_count) == (1, 1)


def test_a_block_is_added_only_when_the_last_one_is_full() -> None:
    pool, seq = BlockPool(num_blocks=4, block_size=4), sequence(1, 16)
    assert [pool.allocate_for(seq, n) and len(seq.blocks) for n in (1, 3, 4, 5, 8, 9)] == [1, 1, 1, 2, 2, 3]


def test_freeing_twice_frees_once() -> None:
    pool, seq = BlockPool(num_blocks=2, block_size=4), sequence(1, 8)
    pool.allocate_for(seq, 8)
    pool.free(seq)
    pool.free(seq)
    pool.check_integrity([seq])
    assert pool.free_count == 2


@pytest.mark.parametrize(("blocks", "size"), [(0, 4), (4, 0)])
def test_a_pool_without_room_is_refused(blocks: int, size: int) -> None:
    with pytest.raises(ValueError, match="needs blocks"):
        BlockPool(blocks, size)


class TestSharing:
    def test_full_pages_that_are_found_get_another_owner_and_none_is_taken(self) -> None:
        pool = BlockPool(8, 4)
        one, two = kept(pool, 10), sequence(1, 10, index=1)
        share(pool, two)
        assert (two.blocks, two.computed, pool.free_count) == (one.blocks[:2], 8, 5)
        assert pool.allocate_for(two, 10)
        assert two.blocks[2] not in one.blocks
        pool.check_integrity([one, two])

    @pytest.mark.parametrize("first", [0, 1])
    def test_a_page_is_free_when_its_last_owner_is_gone(self, first: int) -> None:
        pool = BlockPool(8, 4)
        outputs = [kept(pool, 10), sequence(1, 10, index=1)]
        share(pool, outputs[1])
        gone, here = outputs[first], outputs[1 - first]
        shared = here.blocks[:2]
        pool.free(gone)
        assert here.blocks[:2] == shared
        gone.computed = 0
        pool.check_integrity(outputs)
        pool.free(here)
        assert pool.free_count == 8

    def test_a_sequence_does_not_start_with_all_that_it_has(self) -> None:
        pool = BlockPool(8, 4)
        kept(pool, 10)
        with pytest.raises(RuntimeError, match="can not start with 2 pages"):
            pool.share(sequence(2, 8), pool.find(KEYS[:2]))

    def test_a_sequence_that_has_blocks_does_not_start_again(self) -> None:
        pool = BlockPool(8, 4)
        one = kept(pool, 10)
        with pytest.raises(RuntimeError, match="can not start"):
            pool.share(one, pool.find(KEYS[:2]))


class TestKeeping:
    def test_pages_are_found_after_their_owner_has_gone_and_count_as_free(self) -> None:
        pool = BlockPool(8, 4)
        one = kept(pool, 10)
        blocks = one.blocks[:2]
        pool.free(one)
        assert (pool.find(KEYS), pool.free_count, pool.kept_count, pool.usage) == (blocks, 8, 2, 0)

    def test_a_page_without_those_before_it_is_not_found(self) -> None:
        pool = BlockPool(8, 4)
        kept(pool, 10)
        assert pool.find([b"other", *KEYS]) == []
        assert len(pool.find([KEYS[0], b"other", KEYS[1]])) == 1

    def test_blank_pages_are_used_first_then_the_tail_of_what_was_used_longest_ago(self) -> None:
        pool = BlockPool(5, 4)
        old, new = kept(pool, 9), kept(pool, 5, keys=[b"new"])
        pool.free(old)
        pool.free(new)
        other = sequence(3, 20)
        found = []
        for length in (4, 8, 12, 16, 20):
            assert pool.allocate_for(other, length)
            found.append((len(pool.find(KEYS)), len(pool.find([b"new"])), pool.evictions))
            pool.check_integrity([other])
        assert found == [(2, 1, 0), (2, 1, 0), (1, 1, 1), (0, 1, 2), (0, 0, 3)]

    def test_pages_that_somebody_uses_again_are_not_taken(self) -> None:
        pool = BlockPool(4, 4)
        pool.free(kept(pool, 10))
        again, other = sequence(2, 10), sequence(3, 12)
        share(pool, again)
        assert pool.room_after([], 8) == 0
        assert not pool.allocate_for(other, 12)
        assert pool.allocate_for(other, 8)
        assert pool.find(KEYS) == again.blocks

    def test_what_is_found_but_not_owned_takes_room_as_a_blank_page_does(self) -> None:
        pool = BlockPool(4, 4)
        one = kept(pool, 10)
        assert pool.room_after(pool.find(KEYS), 12) == 1 - 1
        pool.free(one)
        assert pool.room_after(pool.find(KEYS), 12) == 4 - 3

    def test_the_same_page_computed_twice_is_found_once_as_that_with_an_owner(self) -> None:
        pool = BlockPool(8, 4)
        one, two = kept(pool, 10), kept(pool, 10)
        assert pool.find(KEYS) == one.blocks[:2]
        pool.free(two)
        pool.check_integrity([one])
        pool.free(one)
        three = kept(pool, 10)
        assert pool.find(KEYS) == three.blocks[:2]
        pool.check_integrity([three])

    def test_what_is_forgotten_is_not_found_and_whoever_shares_it_keeps_it(self) -> None:
        pool = BlockPool(8, 4)
        one, two = kept(pool, 10), sequence(2, 10)
        share(pool, two)
        pool.forget(one)
        assert pool.find(KEYS) == []
        pool.free(one)
        assert (len(two.blocks), pool.free_count, pool.kept_count) == (2, 6, 0)
        pool.free(two)
        assert (pool.free_count, pool.kept_count) == (8, 0)


class TestIntegrity:
    def test_a_block_in_two_tables_that_nobody_shared_is_found(self) -> None:
        pool, one, two = BlockPool(4, 4), sequence(1, 8), sequence(2, 8)
        pool.allocate_for(one, 8)
        two.blocks = [one.blocks[0]]
        with pytest.raises(RuntimeError, match=r"block \d is in 2 tables, and counts 1"):
            pool.check_integrity([one, two])

    def test_a_lost_block_is_found(self) -> None:
        pool, seq = BlockPool(4, 4), sequence(1, 8)
        pool.allocate_for(seq, 8)
        seq.blocks.pop()
        with pytest.raises(RuntimeError, match=r"block \d is in 0 tables, and counts 1"):
            pool.check_integrity([seq])

    def test_a_shared_block_at_another_page_is_found(self) -> None:
        pool = BlockPool(8, 4)
        one, two = kept(pool, 10), sequence(1, 10, index=1)
        share(pool, two)
        two.blocks.reverse()
        with pytest.raises(RuntimeError, match="another page"):
            pool.check_integrity([one, two])

    def test_a_block_that_is_found_as_what_somebody_else_has_computed_is_found(self) -> None:
        pool = BlockPool(8, 4)
        one = kept(pool, 10)
        one.page_keys[1] = b"other"
        with pytest.raises(RuntimeError, match="found as somebody else's"):
            pool.check_integrity([one])

    def test_a_shared_block_that_is_still_written_to_is_found(self) -> None:
        pool = BlockPool(8, 4)
        one, two = kept(pool, 10), sequence(1, 10, index=1)
        share(pool, two)
        two.computed = 7
        with pytest.raises(RuntimeError, match="still writes to it"):
            pool.check_integrity([one, two])

    def test_a_table_shorter_than_what_is_computed_is_found(self) -> None:
        pool, seq = BlockPool(4, 4), sequence(1, 8)
        pool.allocate_for(seq, 4)
        seq.computed = 5
        with pytest.raises(RuntimeError, match="1 blocks"):
            pool.check_integrity([seq])

    def test_a_table_longer_than_the_tokens_is_found(self) -> None:
        pool, seq = BlockPool(4, 4), sequence(1, 8)
        pool.allocate_for(seq, 9)
        with pytest.raises(RuntimeError, match="3 blocks"):
            pool.check_integrity([seq])
