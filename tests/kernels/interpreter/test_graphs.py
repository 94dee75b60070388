"""Decode steps recorded once and replayed for other batches: rows give the tokens of that adapter alone under peft."""

from functools import partial
from pathlib import Path

import pytest
import torch

from chorus.engine import graphs
from chorus.engine import messages as m
from kernels.interpreter.test_engine import ASKED_ON_CUDA
from support.engines import hold, make_engine, reference, run
from support.tape import Tape
from support.tiny import VOCAB, save_adapter, save_base, solo_greedy

# (prompt's length, new tokens, adapter, step that it comes in). Two recordings, of two rows and of one: the first with
# adapters 1 and 2 serves 1 and 3 in other pages, the second 1 and then 2.
REQUESTS = [(27, 6, 1, 0), (5, 3, 2, 0), (9, 2, 3, 3), (6, 3, 2, 6)]


@pytest.mark.parametrize("family", ["qwen3", "phi3-longrope"])
def test_replays_of_a_recording_serve_batches_of_other_tenants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    for name, operator in ASKED_ON_CUDA.items():
        monkeypatch.setattr(name, partial(operator, triton=True))
    monkeypatch.setattr(graphs, "SEEN_BEFORE", 0)
    base = save_base(tmp_path / "base", family, layers=1)
    adapters = [None, save_adapter(base, tmp_path / "a", 1, r=4), save_adapter(base, tmp_path / "b", 2, r=11)]
    adapters.append(save_adapter(base, tmp_path / "c", 3, r=16))
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length, *_ in REQUESTS]
    arrivals: dict[int, list[m.Command]] = {}
    for i, (prompt, (_, new, which, step)) in enumerate(zip(prompts, REQUESTS, strict=True)):
        folder, sampling = adapters[which], m.Sampling(new, temperature=0.0, ignore_eos=True)
        submit = m.Submit(i, tuple(prompt), sampling, reference(base, folder) if folder else None)
        arrivals.setdefault(step, []).append(submit)
    tape = Tape()
    overlap = family == "qwen3"
    engine = make_engine(base, block_size=8, max_step_tokens=64, record=tape, overlap=overlap)
    hold(engine, [reference(base, folder) for folder in adapters if folder])
    got = run(engine, arrivals)
    for i, (prompt, (_, new, which, _)) in enumerate(zip(prompts, REQUESTS, strict=True)):
        tokens, gap = solo_greedy(base, adapters[which], prompt, new)
        assert gap > 1e-4
        assert got.tokens[i] == tokens
    assert (tape.recorded, tape.replayed) == (2, 6)
    assert got.launches == {m.Launch.RECORDED: 2, m.Launch.GRAPH: 4, m.Launch.PROMPT: 3}
    assert got.graphs == 2
