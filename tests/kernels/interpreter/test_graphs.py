"""Steps with Triton's kernels, recorded once and replayed for other batches, as a CUDA graph would be."""

from functools import partial
from pathlib import Path

import pytest

from chorus import kernels
from chorus.engine import graphs
from kernels.interpreter.test_engine import ASKED_ON_CUDA
from support.replays import LAUNCHES, serve_other_tenants
from support.tape import Tape

IN_GRAPHS = {
    "chorus.engine.graphs.AttentionPlan": kernels.AttentionPlan,
    "chorus.adapters.static_plans.StaticLowRank": kernels.StaticLowRank,
}


@pytest.mark.parametrize("family", ["qwen3", "phi3-longrope"])
def test_replays_of_a_recording_serve_batches_of_other_tenants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    for name, operator in (ASKED_ON_CUDA | IN_GRAPHS).items():
        monkeypatch.setattr(name, partial(operator, triton=True))
    monkeypatch.setattr(graphs, "SEEN_BEFORE", 0)
    tape = Tape()
    got = serve_other_tenants(tmp_path, family, tape, overlap=family == "qwen3")
    assert (tape.recorded, tape.replayed) == (5, 10)
    assert got.launches == LAUNCHES
    assert got.graphs == 5
