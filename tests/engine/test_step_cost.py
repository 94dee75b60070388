"""What a step costs, learned from steps of a known law."""

import random

import pytest

from chorus.engine.step_cost import StepBound, StepCost, Work

FIXED, PER_TOKEN, PER_PAIR = 3e-3, 2e-4, 5e-8


def law(work: Work) -> float:
    return FIXED + PER_TOKEN * work.tokens + PER_PAIR * work.pairs


def learned(noise: float = 0.0, steps: int = 300, hiccups: float = 0.0) -> StepCost:
    """From decodes of up to 16 rows, some of them with a chunk of a prompt."""
    rng, cost = random.Random(1), StepCost()
    for _ in range(steps):
        work = Work()
        for _ in range(rng.randint(1, 16)):
            work = work.plus(rng.randint(1, 2000), 1)
        if rng.random() < 0.3:
            work = work.plus(rng.randint(0, 2000), rng.randint(16, 512))
        seconds = law(work) * (1 + noise * rng.gauss(0, 1))
        cost.observe(work, seconds * (20 if rng.random() < hiccups else 1))
    return cost


def test_the_law_is_found() -> None:
    cost = learned()
    assert (cost.fixed, cost.per_token, cost.per_pair) == pytest.approx((FIXED, PER_TOKEN, PER_PAIR), rel=1e-6)
    assert cost.spread == pytest.approx(1)


@pytest.mark.parametrize("hiccups", [0.0, 0.05])
def test_noise_and_rare_steps_of_20_times_the_length_change_the_law_by_little(hiccups: float) -> None:
    cost = learned(noise=0.05, hiccups=hiccups)
    for work in (Work().plus(500, 1), Work().plus(0, 256), Work().plus(1500, 512)):
        assert cost.seconds(work) == pytest.approx(law(work), rel=0.15)
    assert 1 < cost.spread < 1.3


def test_many_decodes_do_not_make_it_forget_what_prompts_cost() -> None:
    cost = learned()
    for _ in range(1000):
        cost.observe(Work(8, 8000), law(Work(8, 8000)))
    assert cost.seconds(Work().plus(0, 400)) == pytest.approx(law(Work().plus(0, 400)), rel=1e-6)


def test_a_machine_that_becomes_slower_is_noticed() -> None:
    cost = learned()
    for tokens in range(1, 500):
        cost.observe(Work(tokens), 2 * law(Work(tokens)))
    assert cost.seconds(Work(300)) == pytest.approx(2 * law(Work(300)), rel=0.3)


def test_a_single_step_is_taken_to_be_proportional() -> None:
    cost = StepCost()
    assert not cost.is_known
    cost.observe(Work(100), 0.2)
    assert cost.seconds(Work(50)) == pytest.approx(0.1)


def test_tokens_are_known_apart_from_steps_once_sizes_differ() -> None:
    cost = StepCost()
    for tokens, knows in ((5, False), (7, False), (15, False), (16, False), (32, True)):
        cost.observe(Work(tokens), law(Work(tokens)))
        assert cost.knows_tokens is knows


@pytest.mark.parametrize("start", [0, 100, 4000])
def test_the_tokens_that_fit_take_the_time_that_is_left_and_one_more_does_not_fit(start: int) -> None:
    cost, decodes = learned(), Work().plus(700, 1)
    tokens = cost.tokens_within(0.05, start)
    added = [law(decodes.plus(start, count)) - law(decodes) for count in (tokens, tokens + 1)]
    assert added[0] <= 0.05 * (1 + 1e-6) < added[1] * (1 + 1e-4)


def test_a_bound_leaves_a_least_chunk_to_the_first_prompt_and_one_token_to_others() -> None:
    bound = StepBound(learned(), seconds=1e-3, least_chunk=16)
    busy = Work().plus(100, 1)
    assert bound.chunk(busy, 0, first=True) == 16
    assert bound.chunk(busy, 0, first=False) == 1
    assert bound.is_full(busy)


def test_a_bound_keeps_the_step_in_time() -> None:
    bound = StepBound(learned(noise=0.05), seconds=0.05, least_chunk=16)
    decodes = Work(8, 4000)
    count = bound.chunk(decodes, 1000, first=True)
    assert 0.6 * 0.05 < law(decodes.plus(1000, count)) < 0.05
