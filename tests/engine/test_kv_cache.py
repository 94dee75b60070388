"""Pages of the KV cache: free or counted by their owners, never lost, and as many as the tokens need."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.engine.kv_cache import BlockPool
from chorus.engine.messages import Sampling
from chorus.engine.sequence import Sequence


def sequence(request_id: int, length: int, index: int = 0) -> Sequence:
    return Sequence(request_id, tuple(range(length)), Sampling(max_tokens=1), index=index)


def computed(pool: BlockPool, length: int) -> Sequence:
    """A sequence that has its tokens in the cache, but for the last one."""
    seq = sequence(1, length)
    assert pool.allocate_for(seq, length)
    seq.computed = length - 1
    return seq


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
    def test_the_full_pages_of_the_prompt_get_another_owner_and_none_is_taken(self) -> None:
        pool = BlockPool(8, 4)
        one, two = computed(pool, 10), sequence(1, 10, index=1)
        pool.share(one, two)
        assert (two.blocks, two.computed, pool.free_count) == (one.blocks[:2], 8, 5)
        assert pool.allocate_for(two, 10)
        assert two.blocks[2] not in one.blocks
        pool.check_integrity([one, two])

    @pytest.mark.parametrize("first", [0, 1])
    def test_a_page_is_free_when_its_last_owner_is_gone(self, first: int) -> None:
        pool = BlockPool(8, 4)
        outputs = [computed(pool, 10), sequence(1, 10, index=1)]
        pool.share(*outputs)
        gone, here = outputs[first], outputs[1 - first]
        shared = here.blocks[:2]
        pool.free(gone)
        assert here.blocks[:2] == shared
        gone.computed = 0
        pool.check_integrity(outputs)
        pool.free(here)
        assert pool.free_count == 8

    def test_pages_that_are_not_computed_are_refused(self) -> None:
        pool = BlockPool(8, 4)
        one = computed(pool, 10)
        one.computed = 7
        with pytest.raises(RuntimeError, match="can not share 2 pages"):
            pool.share(one, sequence(1, 10, index=1))

    def test_pages_of_another_request_are_refused(self) -> None:
        pool = BlockPool(8, 4)
        with pytest.raises(RuntimeError, match="can not share"):
            pool.share(computed(pool, 10), sequence(2, 10))


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
        one, two = computed(pool, 10), sequence(1, 10, index=1)
        pool.share(one, two)
        two.blocks.reverse()
        with pytest.raises(RuntimeError, match="another page"):
            pool.check_integrity([one, two])

    def test_a_shared_block_that_is_still_written_to_is_found(self) -> None:
        pool = BlockPool(8, 4)
        one, two = computed(pool, 10), sequence(1, 10, index=1)
        pool.share(one, two)
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
