"""What a step says of its rows: in a real engine as solo runs say it, and nothing by halves when a step fails."""

from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import pytest
import torch

from chorus.engine import evaluate as room
from chorus.engine import messages as m
from chorus.engine.evaluate import Drawn, launch
from chorus.engine.layout import Layout, lay_out
from chorus.engine.runner import Runner
from chorus.engine.sampler import NOT_FINITE
from chorus.engine.schedule import Chunk
from chorus.engine.sequence import Sequence
from support.engines import Run, hold, make_engine, reference, run
from support.tiny import VOCAB, solo_logits
from support.worlds import TinyWorld

NEW = 10
NO_EOS: frozenset[int] = frozenset()
ASKED: list[dict[str, Any]] = [
    {"logprobs": 5, "prompt_logprobs": 3},
    {"logprobs": 0},
    {"prompt_logprobs": 0, "prompt_logprobs_from": 17},
    {},
    {"logprobs": 20, "temperature": 0.0},
    {"prompt_logprobs": 20, "presence_penalty": 1.5, "top_k": 3, "logprobs": 1},
]


class Requests:
    """Requests of the base and of adapters, one of them on lm_head, each with its own wishes."""

    def __init__(self, world: TinyWorld) -> None:
        self.base = world.base
        adapters = [None, world.adapter("all"), world.adapter("head", target_modules=["lm_head", "q_proj"])]
        generator = torch.Generator().manual_seed(5)
        self.adapters: list[Path | None] = []
        self.submits: list[m.Submit] = []
        for i, asked in enumerate(ASKED * len(adapters)):
            self.adapters.append(folder := adapters[i % len(adapters)])
            length = int(torch.randint(2, 60, (), generator=generator))
            prompt = tuple(torch.randint(3, VOCAB, (length,), generator=generator).tolist())
            sampling = m.Sampling(**{"max_tokens": NEW, "seed": i, "ignore_eos": True, **asked})
            self.submits.append(m.Submit(i, prompt, sampling, reference(self.base, folder) if folder else None))

    def logprobs(self, i: int, output: list[int]) -> torch.Tensor:
        """What transformers and peft say alone: row p is of the token at p + 1."""
        return solo_logits(self.base, self.adapters[i], [*self.submits[i].prompt, *output]).log_softmax(-1)


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> Requests:
    return Requests(TinyWorld(tmp_path_factory.mktemp("world")))


def assert_tells(found: m.TokenLogprob, row: torch.Tensor, token: int, k: int | None) -> None:
    ids, values = [list(column) for column in zip(*found.top, strict=True)] or [[], []]
    assert len(set(ids)) == k
    torch.testing.assert_close(
        torch.tensor([found.logprob, *values, *values]),
        torch.cat((row[[token]], row[ids], row.topk(k or 0).values)),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("kv_blocks", [1024, 34], ids=["room", "preempted"])
def test_log_probabilities_in_a_mixed_batch_are_those_of_solo_runs(requests: Requests, kv_blocks: int) -> None:
    engine = make_engine(requests.base, kv_blocks=kv_blocks)
    hold(engine, (submit.adapter for submit in requests.submits))
    got: Run = run(engine, {i // 2: list(requests.submits[i : i + 2]) for i in range(0, len(requests.submits), 2)})
    assert got.most_adapters > 1
    assert (got.preemptions > 0) == (kv_blocks == 34)
    for i, submit in enumerate(requests.submits):
        rows = requests.logprobs(i, got.tokens[i])
        start, asked = submit.sampling.prompt_logprobs_from, submit.sampling
        told = [e.logprobs for e in got.events if isinstance(e, m.PromptLogprobs) and e.request_id == i]
        assert [len(entries) for entries in told] == (
            [] if asked.prompt_logprobs is None else [max(len(submit.prompt) - start, 0)]
        )
        for at, entry in enumerate(told[0] if told else (), start):
            assert_tells(entry, rows[at - 1], submit.prompt[at], asked.prompt_logprobs)
        entries = [x for e in got.events if isinstance(e, m.Tokens) and e.request_id == i for x in e.logprobs]
        assert len(entries) == (0 if asked.logprobs is None else NEW)
        for at, entry in enumerate(entries):
            assert_tells(entry, rows[len(submit.prompt) + at - 1], got.tokens[i][at], asked.logprobs)


def test_asking_for_log_probabilities_changes_no_token(requests: Requests) -> None:
    def tokens(**asked: Any) -> dict[int, list[int]]:
        submits: list[m.Command] = [
            m.Submit(s.request_id, s.prompt, m.Sampling(NEW, seed=s.request_id, ignore_eos=True, **asked), s.adapter)
            for s in requests.submits
        ]
        return run(make_engine(requests.base), {0: submits}).tokens

    assert tokens(logprobs=2, prompt_logprobs=2) == tokens()


class Table:
    """Stands for a runner: the logits of a row are a table's row for its token."""

    def __init__(self) -> None:
        self.logits = torch.randn(20, 20, generator=torch.Generator().manual_seed(1))

    def forward(self, layout: Layout, _: torch.Tensor | None) -> torch.Tensor:
        return self.logits[[layout.token_ids[row] for row in layout.logit_rows]]

    def evaluate(self, chunks: list[Chunk]) -> dict[tuple[int, int], Drawn]:
        return launch(cast(Runner, self), lay_out(chunks), NO_EOS).read()


def some_chunks() -> list[Chunk]:
    """A prompt in the middle, one at its end, one that is only scored, and a decode."""
    asked: dict[str, Any] = {"seed": 3, "prompt_logprobs": 2, "logprobs": 2}
    middle = Sequence(0, tuple(range(1, 12)), m.Sampling(4, **asked), blocks=[0])
    last = Sequence(1, tuple(range(4, 12)), m.Sampling(4, **asked, repetition_penalty=1.5), blocks=[1])
    scored = Sequence(2, tuple(range(9, 18)), m.Sampling(0, **asked), blocks=[2])
    decode = Sequence(3, (5, 6), m.Sampling(4, seed=5, frequency_penalty=1.0), output=[7, 7], blocks=[3])
    return [Chunk(middle, 0, 5, False), Chunk(last, 0, 8, True), Chunk(scored, 0, 9, False), Chunk(decode, 3, 1, True)]


def told(chunks: list[Chunk]) -> list[list[m.TokenLogprob]]:
    return [chunk.seq.prompt_logprobs for chunk in chunks]


@pytest.mark.parametrize("name", ["_of_prompts", "_of_tokens"])
def test_a_step_that_failed_has_changed_nothing_and_its_halves_say_what_it_would_have(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    table, whole, halves = Table(), some_chunks(), some_chunks()
    expected = table.evaluate(whole)
    assert [len(entries) for entries in told(whole)] == [5, 7, 8, 0]
    assert set(expected) == {(1, 0), (3, 0)}
    with monkeypatch.context() as broken:
        broken.setattr(room, name, Mock(return_value=Mock(read=Mock(side_effect=ZeroDivisionError))))
        with pytest.raises(ZeroDivisionError):
            table.evaluate(halves)
    assert told(halves) == [[], [], [], []]
    assert table.evaluate(halves[:2]) | table.evaluate(halves[2:]) == expected
    assert told(halves) == told(whole)


def test_behind_a_step_a_row_is_penalised_for_what_it_has_drawn_there_though_it_was_another_row() -> None:
    table, asked = Table(), m.Sampling(9, temperature=0.0, frequency_penalty=1.0)
    first, second = (Sequence(i, (1, 5 + i), asked, blocks=[i]) for i in range(2))
    table.logits = torch.zeros(20, 20)
    table.logits[5, 3] = table.logits[6, 8] = 4.0  # what they draw
    table.logits[0, 8], table.logits[0, 7] = 2.0, 1.5  # 8 again, or 7 if that is penalised
    before = launch(cast(Runner, table), lay_out([Chunk(first, 1, 1, True), Chunk(second, 1, 1, True)]), NO_EOS)
    behind = lay_out([Chunk(second, 2, 1, True)], before.layout.sampled)
    assert launch(cast(Runner, table), behind, NO_EOS, before).read() == {(1, 0): Drawn(7, None)}
    assert before.read() == {(0, 0): Drawn(3, None), (1, 0): Drawn(8, None)}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_request_with_a_prompt_row_that_is_not_finite_is_marked_and_others_are_not(bad: float) -> None:
    """Token 2 is in one prompt only, and not where that is sampled: that request does not sample at all."""
    table, chunks, undisturbed = Table(), some_chunks(), some_chunks()
    expected = table.evaluate(undisturbed)
    table.logits[2, 4] = bad
    got = table.evaluate(chunks)
    assert got.pop((0, 0)) == Drawn(NOT_FINITE, None)
    assert got == expected
    assert told(chunks) == [[], *told(undisturbed)[1:]]


def test_a_row_that_is_not_finite_has_no_log_probability() -> None:
    table, chunks = Table(), some_chunks()
    table.logits[11, 4] = float("nan")
    assert table.evaluate(chunks)[1, 0] == Drawn(NOT_FINITE, None)


def test_a_chunk_that_leaves_a_gap_before_it_is_refused() -> None:
    seq = Sequence(0, tuple(range(1, 12)), m.Sampling(4, prompt_logprobs=0), blocks=[0])
    with pytest.raises(RuntimeError, match="request 0: token 1 of its prompt"):
        Table().evaluate([Chunk(seq, 4, 3, False)])
    assert seq.prompt_logprobs == []
