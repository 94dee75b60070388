"""Steps recorded once and replayed for other batches: rows give the tokens of that adapter alone under peft."""

from pathlib import Path

import torch

from chorus.engine import messages as m
from chorus.engine.graphs import Record
from support.engines import Run, hold, make_engine, reference, run
from support.tiny import VOCAB, save_adapter, save_base, solo_greedy

# (prompt's length, new tokens, adapter, step that it comes in). Five recordings: of up to 32 tokens, two of which have
# logits, made with the prompts of adapters 1 and 2, and replayed with a decode of 1 and the prompt of 3, then with the
# prompts of 2 and of the base; of two decodes, made with 1 and 2, replayed with 1 and 3, 2 and the base; of one decode;
# of two decodes and a prompt of two tokens between them; of three decodes.
REQUESTS = [(27, 6, 1, 0), (5, 3, 2, 0), (31, 2, 3, 3), (20, 4, 2, 6), (11, 3, 0, 6), (2, 2, 0, 7)]
LAUNCHES = {m.Launch.RECORDED: 5, m.Launch.GRAPH: 5}


def serve_other_tenants(folder: Path, family: str, record: Record, *, overlap: bool = False, **adapter: object) -> Run:
    """Serves the requests, whose tokens have to be peft's. `graphs.SEEN_BEFORE` must be 0."""
    base = save_base(folder / "base", family, layers=1)
    if family == "gpt2":
        adapter["fan_in_fan_out"] = True
    ranks = {"a": 4, "b": 11, "c": 16}
    adapters = [None] + [
        save_adapter(base, folder / name, seed, r=rank, **adapter)
        for seed, (name, rank) in enumerate(ranks.items(), start=1)
    ]
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length, *_ in REQUESTS]
    arrivals: dict[int, list[m.Command]] = {}
    for i, (prompt, (_, new, which, step)) in enumerate(zip(prompts, REQUESTS, strict=True)):
        of, sampling = adapters[which], m.Sampling(new, temperature=0.0, ignore_eos=True)
        submit = m.Submit(i, tuple(prompt), sampling, reference(base, of) if of else None)
        arrivals.setdefault(step, []).append(submit)
    engine = make_engine(base, block_size=8, max_step_tokens=64, record=record, overlap=overlap)
    hold(engine, [reference(base, of) for of in adapters if of])
    got = run(engine, arrivals)
    for i, (prompt, (_, new, which, _)) in enumerate(zip(prompts, REQUESTS, strict=True)):
        tokens, gap = solo_greedy(base, adapters[which], prompt, new)
        assert gap > 1e-4
        assert got.tokens[i] == tokens
    return got
