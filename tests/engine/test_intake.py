"""What must be computed before a newcomer has its first token: counted from below."""

from chorus.engine.intake import tokens_to_compute
from chorus.engine.kv_cache import BlockPool
from chorus.engine.messages import Sampling
from chorus.engine.page_keys import PageKeys
from chorus.engine.sequence import Sequence

POOL = BlockPool(16, 4)
KEYS = PageKeys(4, across_requests=True)


def sequence(request_id: int, *prompt: int, computed: int = 0) -> Sequence:
    return Sequence(request_id, prompt, Sampling(max_tokens=4), computed=computed)


def test_different_prompts_are_all_computed() -> None:
    assert tokens_to_compute([sequence(1, *range(10)), sequence(2, *range(100, 107))], KEYS, POOL) == 10 + 7


def test_a_page_that_an_earlier_one_computes_is_computed_once_and_each_has_its_tail() -> None:
    same = [sequence(i, *range(10)) for i in range(3)]
    assert tokens_to_compute(same, KEYS, POOL) == 10 + 2 + 2


def test_a_prompt_under_way_is_computed_from_where_it_is() -> None:
    under_way = sequence(1, *range(10), computed=6)
    assert tokens_to_compute([under_way, sequence(2, *range(10))], KEYS, POOL) == 4 + 2


def test_pages_that_are_there_are_not_computed() -> None:
    pool, before = BlockPool(16, 4), sequence(1, *range(10))
    pool.allocate_for(before, 10)
    before.computed = 9
    for block, key in zip(before.blocks, KEYS.of(before, 2), strict=False):
        pool.keep(block, key)
    assert tokens_to_compute([sequence(2, *range(10))], KEYS, pool) == 2
