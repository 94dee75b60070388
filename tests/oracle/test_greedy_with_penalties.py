"""Greedy tokens under bias, penalties and min_tokens are those of solo logits and the definitions, token by token."""

from typing import Any

import numpy as np
import pytest
import torch

from chorus.engine import messages as m
from support.engines import hold, make_engine, reference, run
from support.reference_sampler import adjusted
from support.tiny import VOCAB, solo_logits
from support.worlds import TinyWorld

NEW = 16
EOS = 2
CLEAR_GAP = 1e-4
ASKED: list[dict[str, Any]] = [
    {"repetition_penalty": 1.6},
    {"repetition_penalty": 0.7, "presence_penalty": 2.0},
    {"frequency_penalty": 2.0, "presence_penalty": -1.0},
    {"logit_bias": ((11, 12.0), (50, 9.0), (EOS, 25.0)), "min_tokens": NEW, "frequency_penalty": 1.1},
    {},
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return TinyWorld(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("kv_blocks", [1024, 40], ids=["room", "preempted"])
def test_each_token_is_the_likeliest_of_what_solo_logits_become(world: TinyWorld, kv_blocks: int) -> None:
    folders = [None, world.adapter("a"), world.adapter("b")]
    generator = torch.Generator().manual_seed(9)
    submits: list[m.Submit] = []
    for i, asked in enumerate(ASKED * len(folders)):
        folder = folders[i % len(folders)]
        prompt = tuple(torch.randint(3, VOCAB, (10 + 3 * i,), generator=generator).tolist())
        sampling = m.Sampling(max_tokens=NEW, temperature=0.0, **asked)
        submits.append(m.Submit(i, prompt, sampling, reference(world.base, folder) if folder else None))
    engine = make_engine(world.base, kv_blocks=kv_blocks)
    hold(engine, (submit.adapter for submit in submits))
    got = run(engine, {0: [*submits]})
    assert (got.preemptions > 0) == (kv_blocks == 40)
    differ = 0
    for submit in submits:
        output = got.tokens[submit.request_id]
        rows = solo_logits(world.base, folders[submit.request_id % len(folders)], [*submit.prompt, *output])
        for at, token in enumerate(output):
            row = rows[len(submit.prompt) + at - 1]
            scores = adjusted(row.tolist(), submit.sampling, submit.prompt, output[:at], [EOS])
            second, first = np.sort(scores)[-2:]
            assert first - second > CLEAR_GAP, "the oracle itself is not sure"
            assert token == scores.argmax(), (submit.sampling, at)
            differ += token != int(row.argmax())
        assert EOS not in output[:-1]
        assert len(output) == NEW or output[-1] == EOS
    assert differ > 30, "the penalties hardly changed a token"
