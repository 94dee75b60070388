"""The engine on a GPU: steps replayed as CUDA graphs give the tokens of peft alone, and no step waits."""

from pathlib import Path
from typing import Any

import pytest
import torch

from chorus.engine import engine as engine_room
from chorus.engine import graphs
from chorus.engine import messages as m
from chorus.engine.evaluate import launch
from chorus.engine.graphs import CudaGraphs
from chorus.engine.runner import Runner
from support.engines import make_engine, reference, run
from support.tiny import VOCAB, save_adapter, save_base, solo_greedy

pytestmark = pytest.mark.gpu

NEW_TOKENS = 12


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3-longrope", "gpt2"])
def test_rows_of_replayed_steps_equal_the_solo_run(tmp_path: Path, family: str, overlap: bool) -> None:
    base = save_base(tmp_path / "base", family)
    adapters = [None, save_adapter(base, tmp_path / "a", 1, r=4), save_adapter(base, tmp_path / "b", 2, r=40)]
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in (14, 5, 19, 30, 9, 11)]
    sampling = m.Sampling(NEW_TOKENS, temperature=0.0, ignore_eos=True)
    arrivals: dict[int, list[m.Command]] = {}
    for i, prompt in enumerate(prompts):
        folder = adapters[i % 3]
        submit = m.Submit(i, tuple(prompt), sampling, reference(base, folder) if folder else None)
        arrivals.setdefault(3 * i, []).append(submit)
    recorded: dict[str, Any] = {"record": CudaGraphs(), "overlap": overlap}
    engine = make_engine(base, block_size=16, max_step_tokens=64, device="cuda", **recorded)
    got = run(engine, arrivals)
    for i, prompt in enumerate(prompts):
        tokens, gap = solo_greedy(base, adapters[i % 3], prompt, NEW_TOKENS)
        assert gap > 1e-4
        assert got.tokens[i] == tokens


def test_no_step_waits_for_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts and decodes, recorded or not; what was drawn is read after the forward pass."""
    forward, replays = Runner.forward, list[torch.Tensor]()
    recorded = graphs.StepGraphs.run

    def without_waiting(self: Runner, *batch: Any) -> torch.Tensor:
        if len(replays) < 2:  # compiling and recording may wait
            return forward(self, *batch)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return forward(self, *batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def noted(self: graphs.StepGraphs, *batch: Any) -> torch.Tensor | None:
        logits = recorded(self, *batch)
        if logits is not None:
            replays.append(logits)
        return logits

    monkeypatch.setattr(Runner, "forward", without_waiting)
    monkeypatch.setattr(graphs.StepGraphs, "run", noted)
    base = save_base(tmp_path / "base", "llama")
    adapter = reference(base, save_adapter(base, tmp_path / "a", 1, r=4))
    sampling = m.Sampling(30, temperature=0.0, ignore_eos=True)
    submits: list[m.Command] = [m.Submit(i, tuple(range(3, 20 + i)), sampling, adapter) for i in range(4)]
    engine = make_engine(base, block_size=16, max_step_tokens=64, device="cuda", record=CudaGraphs())
    run(engine, {0: submits[:2], 20: submits[2:]})
    assert len(replays) > 20


@pytest.mark.parametrize("record", [None, CudaGraphs], ids=["launch by launch", "graphs"])
def test_no_step_that_is_launched_behind_another_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: Any
) -> None:
    """Nor does its drawing; the tokens are those of steps one after the other."""
    behind = list[int]()

    def without_waiting(*arguments: Any) -> Any:
        if arguments[-1] is None:
            return launch(*arguments)
        behind.append(len(behind))
        if len(behind) < 10:  # compiling and recording may wait
            return launch(*arguments)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(engine_room, "launch", without_waiting)
    base = save_base(tmp_path / "base", "llama")
    adapter = reference(base, save_adapter(base, tmp_path / "a", 1, r=4))
    ways: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.95},
        {"temperature": 1.0, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.2},
        {"temperature": 0.0, "logit_bias": ((5, 2.0),), "min_tokens": 20, "logprobs": 5},
    ]
    sampling = [m.Sampling(40, seed=i, ignore_eos=True, **way) for i, way in enumerate(ways)]
    submits: list[m.Command] = [m.Submit(i, tuple(range(3 + i, 12)), way, adapter) for i, way in enumerate(sampling)]
    outputs = []
    for overlap in (False, True):
        graphs_of = record() if record is not None else None
        engine = make_engine(base, block_size=16, max_step_tokens=64, device="cuda", record=graphs_of, overlap=overlap)
        outputs.append(run(engine, {0: submits}).outputs)
    assert outputs[0] == outputs[1]
    assert len(behind) > 30
