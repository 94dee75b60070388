"""A CPU's steps, recorded on tapes and replayed for other tenants' batches, against peft solo; all families."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from chorus.adapters import artifact as artifacts
from chorus.adapters.kinds import Lowering
from chorus.adapters.pool import AdapterPool
from chorus.engine import graphs
from chorus.engine import messages as m
from chorus.engine.layout import lay_out
from chorus.engine.runner import Runner
from chorus.engine.schedule import Chunk
from chorus.engine.sequence import Sequence
from chorus.kernels.native.tape import Tapes
from chorus.models.base import load_base
from support.lowered import lower
from support.replays import LAUNCHES, serve_other_tenants
from support.tiny import FAMILIES, save_adapter, save_base


@pytest.mark.parametrize("family", FAMILIES)
def test_replays_of_a_recording_serve_batches_of_other_tenants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr(graphs, "SEEN_BEFORE", 0)
    got = serve_other_tenants(tmp_path, family, Tapes())
    assert got.launches == LAUNCHES
    assert got.graphs == 5


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_adapters_of_the_head_are_recorded_with_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Of the head alone: no other site has a plan. Phi computes all rows of its last layer, Llama those wanted."""
    monkeypatch.setattr(graphs, "SEEN_BEFORE", 0)
    got = serve_other_tenants(tmp_path, family, Tapes(), target_modules=["lm_head"])
    assert got.launches == LAUNCHES
    assert got.graphs == 5


@dataclass(frozen=True)
class Part:
    """`count` tokens behind `before` others, of the base or one of the adapters; the last is sampled or not."""

    adapter: int
    before: int
    count: int
    samples: bool


def batches(adapters: int) -> st.SearchStrategy[list[Part]]:
    counts = st.just(1) | st.integers(1, 9)
    samples = st.just(True) | st.booleans()
    part = st.builds(Part, st.integers(0, adapters), st.integers(0, 40), counts, samples)
    return st.lists(part, min_size=1, max_size=12)


@pytest.mark.parametrize("rehearsed", [False, True], ids=["recorded with the batch", "rehearsed without"])
def test_in_bfloat16_a_replay_is_the_step_bit_for_bit(
    rehearsed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decodes and chunks of prompts, of the base and of adapters, and what they leave in the cache.

    The third adapter acts on logits; the fourth embeds, and is never recorded.
    """
    monkeypatch.setattr(graphs, "SEEN_BEFORE", 1000 if rehearsed else 0)
    monkeypatch.setattr(graphs, "KEPT", 1000)
    folder = save_base(tmp_path / "base", "llama", layers=1)
    base = load_base(str(folder), device="cpu", dtype="bfloat16")
    pool = AdapterPool(base.sites, rows=64, device=base.device, dtype=base.dtype)
    slots = [-1]
    targets = ["all-linear", ["q_proj", "down_proj"], ["lm_head", "q_proj"], ["embed_tokens"]]
    for seed, sites in enumerate(targets, start=1):
        read = artifacts.read(save_adapter(folder, tmp_path / str(seed), seed, r=4 * seed, target_modules=sites))
        slot = pool.load(lower(Lowering(base.sites, max_rank=64, base_weight=base.weight), read, base.dtype))
        assert slot is not None
        slots.append(slot)
    recorded, plain = (Runner(base, pool, kv_blocks=64, block_size=16, record=record) for record in (Tapes(), None))
    assert recorded.graphs is not None
    launches: Counter[m.Launch] = Counter()

    embedding = batches(3).map(lambda batch: [*batch, Part(4, before=2, count=1, samples=True)])

    @settings(max_examples=150, deadline=None)
    @given(batches(3) | batches(3) | batches(3) | embedding)
    def check(batch: list[Part]) -> None:
        chunks = []
        for i, part in enumerate(batch):
            length = part.before + part.count
            seq = Sequence(i, tuple(range(3, 3 + length)), m.Sampling(max_tokens=99), slot=slots[part.adapter])
            seq.blocks = list(range(4 * i, 4 * i + 4))
            chunks.append(Chunk(seq, part.before, part.count, part.samples))
        layout = lay_out(chunks)
        assume(layout.logit_rows)
        if rehearsed:
            for _ in range(2):
                recorded.forward(layout)
            recorded.rehearse()
        assert torch.equal(recorded.forward(layout), plain.forward(layout))
        for cache, expected in ((recorded._k_cache, plain._k_cache), (recorded._v_cache, plain._v_cache)):
            assert torch.equal(cache[:, :64], expected)
        launches.update(recorded.graphs.take_launches() if recorded.graphs else {})

    check()
    assert launches[m.Launch.GRAPH] + launches[m.Launch.RECORDED] > 50
    assert launches[m.Launch.GRAPH] > 5
    assert launches[m.Launch.ADAPTER] > 5
    assert launches[m.Launch.FAILED] == 0


def test_a_page_that_is_none_is_refused_before_anything_is_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "SEEN_BEFORE", 0)
    base = load_base(str(save_base(tmp_path / "base", "llama", layers=1)), device="cpu", dtype="bfloat16")
    pool = AdapterPool(base.sites, rows=16, device=base.device, dtype=base.dtype)
    runner = Runner(base, pool, kv_blocks=8, block_size=16, record=Tapes())
    seq = Sequence(0, tuple(range(3, 12)), m.Sampling(max_tokens=99))
    for block in (7, 8):  # 8 is the recordings' own, for rows of nobody
        seq.blocks = [block]
        runner.forward(lay_out([Chunk(seq, 8, 1, samples=True)]))
    seq.blocks = [9]
    with pytest.raises(ValueError, match="a block over 8, the last there is"):
        runner.forward(lay_out([Chunk(seq, 8, 1, samples=True)]))
