"""The last layer computes past its attention only rows whose logits are wanted: those of each sequence alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chorus.adapters import artifact as artifacts
from chorus.adapters.kinds import Lowering
from chorus.adapters.pool import AdapterPool
from chorus.engine import messages as m
from chorus.engine.layout import Layout, lay_out
from chorus.engine.runner import Runner
from chorus.engine.schedule import Chunk
from chorus.engine.sequence import Sequence
from chorus.models.base import Base, load_base
from support.lowered import lower
from support.tiny import FAMILIES, VOCAB, save_adapter, save_base, solo_logits

PAGES = 8
PAST_ATTENTION = "o_proj|gate_proj|up_proj|gate_up_proj|down_proj"


def adapters_of(family: str) -> dict[str, dict[str, Any]]:
    """Of the last layer past attention and the head, of its attention alone, of all linears."""
    last = FAMILIES[family].num_hidden_layers - 1
    return {
        "past attention": {"r": 4, "target_modules": rf".*\.{last}\..*({PAST_ATTENTION})|lm_head"},
        "attention": {"r": 3, "target_modules": rf".*\.{last}\..*(q_proj|k_proj|v_proj|qkv_proj)"},
        "all": {"r": 11},
    }


class World:
    """A base, its adapters in a pool, and a runner of both."""

    def __init__(self, folder: Path, family: str, dtype: str = "float32") -> None:
        self.folder = save_base(folder / "base", family, tied=False)
        self.base: Base = load_base(str(self.folder), device="cpu", dtype=dtype)
        self.pool = AdapterPool(self.base.sites, rows=64, device=self.base.device, dtype=self.base.dtype)
        self.adapters: dict[int, Path | None] = {-1: None}
        self.slots = {"none": -1}
        for seed, (name, config) in enumerate(adapters_of(family).items(), start=1):
            adapter = save_adapter(self.folder, folder / name, seed, **config)
            read = artifacts.read(adapter)
            lowering = Lowering(self.base.sites, max_rank=64, base_weight=self.base.weight)
            slot = self.pool.load(lower(lowering, read, self.base.dtype))
            assert slot is not None
            self.slots[name], self.adapters[slot] = slot, adapter
        self.runner = self.new_runner()

    def new_runner(self) -> Runner:
        return Runner(self.base, self.pool, kv_blocks=6 * PAGES, block_size=4)

    def sequence(self, number: int, adapter: str, length: int, **asked: Any) -> Sequence:
        """With a prompt and pages of its own."""
        generator = torch.Generator().manual_seed(number)
        prompt = tuple(torch.randint(3, VOCAB, (length,), generator=generator).tolist())
        blocks = list(range(PAGES * number, PAGES * (number + 1)))
        return Sequence(number, prompt, m.Sampling(max_tokens=9, **asked), slot=self.slots[adapter], blocks=blocks)

    def step(self, *chunks: tuple[Sequence, int, int]) -> Layout:
        """Computes tokens [start, end) of each sequence; the logits have to be those of transformers and peft."""
        layout = laid_out(*chunks)
        logits = self.runner.forward(layout)
        assert logits.shape == (len(layout.logit_rows), VOCAB)
        for chunk, row in zip(layout.sampled, layout.sampled_at, strict=True):
            self._check(logits[row : row + 1], chunk.seq, chunk.start + chunk.count - 1)
        for seq, row, positions in layout.scored:
            self._check(logits[row : row + len(positions)], seq, positions.start)
        return layout

    def _check(self, logits: Tensor, seq: Sequence, position: int) -> None:
        alone = solo_logits(self.folder, self.adapters[seq.slot], list(seq.prompt))[position : position + len(logits)]
        error = (logits - alone).square().mean().sqrt() / alone.square().mean().sqrt()
        assert error <= 1e-5, f"sequence {seq.request_id} from {position} on: {error}"


def laid_out(*chunks: tuple[Sequence, int, int]) -> Layout:
    """Who ends with its chunk samples."""
    return lay_out([Chunk(seq, start, end - start, end == len(seq.prompt)) for seq, start, end in chunks])


@pytest.fixture(scope="module", params=["llama", "gemma3", "phi3-windowed"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"), request.param)


def test_rows_of_a_mixed_batch_equal_the_solo_run(world: World) -> None:
    """Whole prompts and pieces of some, one scored, of several tenants; then the pieces' ends beside decodes."""
    plain, scored = world.sequence(0, "none", 17), world.sequence(1, "past attention", 9, prompt_logprobs=0)
    piece, own = world.sequence(2, "past attention", 21), world.sequence(3, "attention", 13)
    whole, short = world.sequence(4, "all", 11), world.sequence(5, "past attention", 2)
    first = world.step((plain, 0, 16), (scored, 0, 9), (piece, 0, 14), (own, 0, 13), (whole, 0, 10), (short, 0, 2))
    assert len(first.logit_rows) == 9 + 1 + 1
    second = world.step((plain, 16, 17), (piece, 14, 21), (whole, 10, 11))
    assert len(second.logit_rows) == 3


def test_decodes_alone_equal_the_solo_run(world: World) -> None:
    rows = [world.sequence(i, name, 7 + i) for i, name in enumerate(world.slots)]
    world.step(*((seq, 0, len(seq.prompt) - 1) for seq in rows))
    layout = world.step(*((seq, len(seq.prompt) - 1, len(seq.prompt)) for seq in rows))
    assert layout.wants_all


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_keys_and_values_are_stored_whichever_logits_are_wanted(tmp_path: Path, dtype: str) -> None:
    world = World(tmp_path, "llama", dtype)
    chunks = [(world.sequence(i, name, 9 + i), 0, 9) for i, name in enumerate(world.slots)]
    some = laid_out(*chunks)
    everything = some._replace(logit_rows=list(range(len(some.token_ids))), logit_segments=some.segments)
    nothing = some._replace(logit_rows=[], logit_segments=(), sampled=[], sampled_at=[])
    caches = []
    for layout in (everything, some, nothing):
        runner = world.new_runner()
        assert runner.forward(layout).shape == (len(layout.logit_rows), VOCAB)
        caches.append(torch.stack((runner._k_cache, runner._v_cache)))
    assert len(some.logit_rows) == 1
    assert all(bool(page.any()) for page in caches[0][:, :, :2].flatten(0, 2))
    assert torch.equal(caches[1], caches[0])
    assert torch.equal(caches[2], caches[0])


class RowsSeen:
    """How many rows reached parts of a model; those that were not called are not there."""

    def __init__(self, base: Base, **parts: str) -> None:
        self.of: dict[str, int] = {}
        for name, path in parts.items():
            base.module.get_submodule(path).register_forward_pre_hook(self._note(name))

    def _note(self, name: str) -> Any:
        def note(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            self.of[name] = given[0].numel() // given[0].shape[-1]

        return note

    def take(self) -> dict[str, int]:
        of, self.of = self.of, {}
        return of


def test_what_is_past_the_last_attention_sees_only_rows_that_are_wanted(tmp_path: Path) -> None:
    world = World(tmp_path, "llama")
    before, last, seen_by = "model.layers.1", "model.layers.2", ("self_attn.o_proj", "mlp.down_proj")
    paths = {f"{layer[-1]} {part}": f"{layer}.{part}" for layer in (before, last) for part in seen_by}
    rows = RowsSeen(world.base, **paths, norm="model.norm", head="lm_head")

    def expected(all_rows: int, wanted: int) -> dict[str, int]:
        of_last = dict.fromkeys(("2 self_attn.o_proj", "2 mlp.down_proj"), wanted) if wanted else {}
        of_all = dict.fromkeys(("1 self_attn.o_proj", "1 mlp.down_proj"), all_rows)
        return of_all | of_last | {"norm": wanted, "head": wanted}

    one, other = world.sequence(0, "none", 17), world.sequence(1, "all", 12, prompt_logprobs=0)
    for chunks, all_rows, wanted in (
        ([(one, 0, 5)], 5, 0),
        ([(one, 5, 17), (other, 0, 12)], 24, 13),
        ([(one, 16, 17)], 1, 1),
    ):
        world.step(*chunks)
        assert rows.take() == expected(all_rows, wanted)
