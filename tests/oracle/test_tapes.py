"""A CPU's steps, recorded on tapes and replayed for other tenants' batches, against peft solo; all families."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from chorus.adapters import artifact as artifacts
from chorus.adapters import kinds
from chorus.adapters.pool import AdapterPool
from chorus.engine import graphs
from chorus.engine import messages as m
from chorus.engine.layout import lay_out
from chorus.engine.runner import Runner
from chorus.engine.schedule import Chunk
from chorus.engine.sequence import Sequence
from chorus.kernels.native.tape import Tapes
from chorus.models.base import load_base
from support.replays import LAUNCHES, serve_other_tenants
from support.tiny import FAMILIES, save_adapter, save_base


@pytest.mark.parametrize("family", FAMILIES)
def test_replays_of_a_recording_serve_batches_of_other_tenants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr(graphs, "SEEN_BEFORE", 0)
    got = serve_other_tenants(tmp_path, family, Tapes())
    assert got.launches == LAUNCHES
    assert got.graphs == 3


@pytest.mark.parametrize("prompts", [(1, 1, 1, 1, 1), (1, 6, 1, 9, 1)], ids=["decodes", "prompts"])
def test_in_bfloat16_a_replay_is_the_step_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompts: tuple[int, ...]
) -> None:
    monkeypatch.setattr(graphs, "SEEN_BEFORE", 1)
    folder = save_base(tmp_path / "base", "llama")
    base = load_base(str(folder), device="cpu", dtype="bfloat16")
    pool = AdapterPool(base.sites, rows=64, device=base.device, dtype=base.dtype)
    slots: list[int] = []
    for seed, rank in ((1, 5), (2, 16)):
        read = artifacts.read(save_adapter(folder, tmp_path / str(rank), seed, r=rank))
        slot = pool.load(kinds.lower(read, base.sites, max_rank=64))
        assert slot is not None
        slots.append(slot)
    recorded, plain = (Runner(base, pool, kv_blocks=64, block_size=16, record=record) for record in (Tapes(), None))
    launches: Counter[m.Launch] = Counter()
    for step in range(12):
        # Five that go on, the base's, the first adapter's three, the second's; two of them by some tokens at a time,
        # where the one's last row is not sampled.
        chunks = []
        for i, slot in enumerate((-1, slots[0], slots[0], slots[0], slots[1])):
            seq = Sequence(i, tuple(range(3, 20 + i + step)), m.Sampling(max_tokens=99), slot=slot)
            seq.blocks = list(range(4 * i, 4 * i + 4))
            count = prompts[i] if step % 2 else 1
            chunks.append(Chunk(seq, len(seq.prompt) - count, count, samples=count != 6))
        layout = lay_out(chunks if step % 3 else chunks[1:])
        assert torch.equal(recorded.forward(layout), plain.forward(layout))
        assert recorded.graphs is not None
        launches += recorded.graphs.take_launches()
    assert launches[m.Launch.GRAPH] >= 4
