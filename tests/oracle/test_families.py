"""Every family, in one table: rows of a mixed batch give the tokens and logits of that adapter alone, in fp32.

Each family comes with its head tied to the embedding and with a head of its own. Each batch packs long and short
prompts, past every window, in several chunks, without an adapter, with LoRA on all linears, on the embedding, on
embedding and head, and on learned positions where PEFT adapts them.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from chorus.adapters import artifact as artifacts
from chorus.engine import messages as m
from chorus.models.base import load_base
from chorus.models.families import FAMILIES as SERVED
from support.engines import make_engine, reference, run
from support.tiny import FAMILIES, VOCAB, save_adapter, save_base, solo_greedy, solo_logits

NEW_TOKENS = 6
CLEAR_GAP = 1e-4
LENGTHS = (41, 5)
EMBEDDINGS = {"gpt2": "wte", "gpt-neox": "embed_in"}
POSITIONS = {"gpt2": "wpe"}


def adapters_of(family: str) -> dict[str, dict[str, Any]]:
    """LoRA configs by name; PEFT takes embeddings and heads of every family."""
    embedding = EMBEDDINGS.get(family, "embed_tokens")
    configs: dict[str, dict[str, Any]] = {
        "linears": {"r": 5, "lora_alpha": 9, "fan_in_fan_out": family == "gpt2"},
        "embedding": {"r": 3, "lora_alpha": 5, "target_modules": [embedding]},
        "embedding-and-head": {"r": 4, "lora_alpha": 3, "target_modules": [embedding, "lm_head"]},
    }
    if positions := POSITIONS.get(family):
        configs["positions"] = {"r": 3, "lora_alpha": 7, "target_modules": [positions]}
        both = {"r": 6, "lora_alpha": 4, "use_rslora": True, "rank_pattern": {positions: 2}}
        configs["positions-and-embedding"] = {**both, "target_modules": [positions, embedding]}
    return configs


class World:
    """A family's base and adapters, and what each request gives alone under transformers and peft."""

    def __init__(self, folder: Path, family: str, *, tied: bool) -> None:
        self.base = save_base(folder / "base", family, tied=tied)
        self.adapters: dict[str, Path | None] = {"none": None}
        for seed, (name, config) in enumerate(adapters_of(family).items()):
            self.adapters[name] = save_adapter(self.base, folder / name, seed, **config)
        self.generator = torch.Generator().manual_seed(5)
        drawn = [(name, *self._clear(name, length)) for name in self.adapters for length in LENGTHS]
        self.requests = [(name, prompt) for name, prompt, _ in drawn]
        self.expected = [tokens for _, _, tokens in drawn]

    def _clear(self, name: str, length: int) -> tuple[list[int], list[int]]:
        """A prompt and what follows it, the likeliest token well ahead of the second each time."""
        for _ in range(4):
            prompt: list[int] = torch.randint(3, VOCAB, (length,), generator=self.generator).tolist()
            tokens, gap = solo_greedy(self.base, self.adapters[name], prompt, NEW_TOKENS)
            if gap > CLEAR_GAP:
                return prompt, tokens
        raise AssertionError(f"{name}: the oracle itself is not sure ({gap})")

    def submit(self, i: int, **sampling: Any) -> m.Submit:
        name, prompt = self.requests[i]
        folder = self.adapters[name]
        adapter = reference(self.base, folder) if folder else None
        return m.Submit(i, tuple(prompt), m.Sampling(temperature=0.0, ignore_eos=True, **sampling), adapter)

    def arrivals(self, **sampling: Any) -> dict[int, list[m.Command]]:
        """Two at a time, so that prefills run beside decodes."""
        return {
            i: [self.submit(i, **sampling), self.submit(i + 1, **sampling)] for i in range(0, len(self.requests), 2)
        }


TABLE = {f"{family}, {'tied' if tied else 'untied'}": (family, tied) for family in FAMILIES for tied in (True, False)}


@pytest.fixture(scope="module", params=list(TABLE.values()), ids=list(TABLE))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    family, tied = request.param
    return World(tmp_path_factory.mktemp(family), family, tied=tied)


def test_the_table_has_every_family_that_is_served_and_no_other() -> None:
    assert {config.model_type for config in FAMILIES.values()} == SERVED.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_go_past_the_window(family: str) -> None:
    assert (getattr(FAMILIES[family], "sliding_window", None) or 0) * 2 < LENGTHS[0]


def test_row_of_a_mixed_batch_equals_the_solo_run(world: World) -> None:
    got = run(make_engine(world.base), world.arrivals(max_tokens=NEW_TOKENS))
    for i, (name, prompt) in enumerate(world.requests):
        assert got.tokens[i] == world.expected[i], f"{name}, {len(prompt)} tokens"
    assert got.most_adapters > 1


def test_log_probabilities_of_the_prompt_equal_the_solo_run(world: World) -> None:
    got = run(make_engine(world.base), world.arrivals(max_tokens=0, prompt_logprobs=0))
    told = {event.request_id: event.logprobs for event in got.events if isinstance(event, m.PromptLogprobs)}
    for i, (name, prompt) in enumerate(world.requests):
        expected = solo_logits(world.base, world.adapters[name], prompt).log_softmax(-1)
        oracle = expected[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])]
        ours = torch.tensor([entry.logprob for entry in told[i]])
        error = (ours - oracle).pow(2).mean().sqrt() / oracle.pow(2).mean().sqrt()
        assert error <= 1e-5, f"{name}, {len(prompt)} tokens: {error}"


def test_the_oracle_bites(world: World) -> None:
    """Each adapter changes the logits, in its own way."""
    prompt = world.requests[0][1]
    logits = [solo_logits(world.base, folder, prompt) for folder in world.adapters.values()]
    for i, one in enumerate(logits):
        for other in logits[i + 1 :]:
            assert (one - other).abs().max() > 1e-2


def test_peft_and_the_server_know_only_the_fused_modules_of_phi3(tmp_path: Path) -> None:
    """An adapter of q_proj or gate_proj can not be made with PEFT on Phi 3: the base has one module for all parts."""
    base = save_base(tmp_path / "base", "phi3-windowed")
    with pytest.raises(ValueError, match="not found in the base model"):
        save_adapter(base, tmp_path / "split", 1, r=2, target_modules=["q_proj", "gate_proj"])
    adapter = artifacts.read(save_adapter(base, tmp_path / "fused", 1, r=2))
    modules = {name.rpartition(".lora_")[0] for name in adapter.tensors}
    assert modules <= load_base(str(base), device="cpu", dtype="float32").sites.keys()
    assert {name.rpartition(".")[2] for name in modules} == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
