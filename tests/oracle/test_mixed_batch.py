"""Every row of a mixed batch gives the greedy tokens of that adapter alone under peft + transformers, in fp32."""

from pathlib import Path
from typing import Any

import pytest
import torch

from chorus.engine import messages as m
from support.engines import make_engine, reference, run
from support.tiny import VOCAB, save_adapter, save_base, solo_greedy

NEW_TOKENS = 12
CLEAR_GAP = 1e-4

LLAMA: dict[str, dict[str, Any]] = {
    "r4": {"r": 4},
    "r8": {"r": 8, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]},
    "r16-rslora": {"r": 16, "lora_alpha": 4, "use_rslora": True},
    "r64": {"r": 64, "lora_alpha": 16},
    "patterns": {
        "r": 6,
        "rank_pattern": {"q_proj": 11, r"model\.layers\.1\.mlp\.up_proj": 3},
        "alpha_pattern": {"v_proj": 5, "down_proj": 20},
    },
    "regex": {"r": 5, "target_modules": r".*\.(o_proj|gate_proj)", "exclude_modules": r".*layers\.0\..*"},
    "one-layer": {"r": 8, "lora_alpha": 40, "target_modules": ["up_proj", "k_proj"], "layers_to_transform": [1]},
    "head": {"r": 8, "target_modules": ["lm_head", "q_proj"]},
}
GPT2: dict[str, dict[str, Any]] = {
    "r4": {"r": 4, "fan_in_fan_out": True},
    "r16": {"r": 16, "lora_alpha": 48, "target_modules": ["c_attn"], "fan_in_fan_out": True},
    "r64": {"r": 64, "fan_in_fan_out": True},
    "patterns": {"r": 8, "rank_pattern": {"c_fc": 3}, "alpha_pattern": {"c_attn": 30}, "fan_in_fan_out": True},
}
CASES = {"llama": LLAMA, "llama-tied-bias": {k: v for k, v in LLAMA.items() if k != "head"}, "gpt2": GPT2}


class World:
    """One base, its adapters, and for each request the tokens that peft + transformers give it alone."""

    def __init__(self, folder: Path, family: str) -> None:
        self.base = save_base(folder / "base", family)
        self.adapters: dict[str, Path | None] = {"none": None}
        for seed, (name, config) in enumerate(CASES[family].items()):
            self.adapters[name] = save_adapter(self.base, folder / name, seed, **config)
        generator = torch.Generator().manual_seed(11)
        self.requests: list[tuple[str, list[int]]] = []
        for name in [*self.adapters, *self.adapters]:
            length = int(torch.randint(3, 60, (), generator=generator))
            self.requests.append((name, torch.randint(3, VOCAB, (length,), generator=generator).tolist()))
        self.expected = []
        for name, prompt in self.requests:
            tokens, gap = solo_greedy(self.base, self.adapters[name], prompt, NEW_TOKENS)
            assert gap > CLEAR_GAP, f"{name}: the oracle itself is not sure ({gap})"
            self.expected.append(tokens)

    def submit(self, i: int) -> m.Submit:
        name, prompt = self.requests[i]
        folder = self.adapters[name]
        return m.Submit(
            request_id=i,
            prompt=tuple(prompt),
            sampling=m.Sampling(NEW_TOKENS, temperature=0.0, ignore_eos=True),
            adapter=reference(self.base, folder) if folder else None,
        )


@pytest.fixture(scope="module", params=CASES)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"), request.param)


def test_the_oracle_bites(world: World) -> None:
    """Adapters change what is generated, each in its own way."""
    prompt = world.requests[0][1]
    answers = [tuple(solo_greedy(world.base, folder, prompt, NEW_TOKENS)[0]) for folder in world.adapters.values()]
    assert len(set(answers)) == len(answers)


@pytest.mark.parametrize(
    ("every", "kv_tokens", "adapter_rows"),
    [
        pytest.param(0, 2048, 256, id="all-at-once"),
        pytest.param(1, 2048, 256, id="one-a-step"),
        pytest.param(3, 2048, 256, id="staggered: prefills beside decodes"),
        pytest.param(0, 128, 256, id="pages run out: preempted and recomputed"),
        pytest.param(2, 2048, 72, id="adapters do not all fit: loaded and evicted meanwhile"),
    ],
)
def test_row_of_mixed_batch_equals_solo_run(world: World, every: int, kv_tokens: int, adapter_rows: int) -> None:
    engine = make_engine(world.base, kv_blocks=kv_tokens // 2, block_size=2, adapter_rows=adapter_rows)
    arrivals: dict[int, list[m.Command]] = {}
    for i in range(len(world.requests)):
        arrivals.setdefault(i * every, []).append(world.submit(i))
    got = run(engine, arrivals)
    for i, expected in enumerate(world.expected):
        assert got.tokens[i] == expected, f"request {i} ({world.requests[i][0]})"
    assert got.most_adapters > 1
    assert (got.preemptions > 0) == (kv_tokens == 128)
    assert (got.evictions > 0) == (adapter_rows == 72)
    assert engine.blocks.usage == 0


@pytest.mark.gpu
def test_row_of_mixed_batch_equals_solo_run_on_cuda(world: World) -> None:
    engine = make_engine(world.base, device="cuda")
    got = run(engine, {i: [world.submit(i)] for i in range(len(world.requests))})
    for i, expected in enumerate(world.expected):
        assert got.tokens[i] == expected, f"request {i} ({world.requests[i][0]})"
    assert got.most_adapters > 1
