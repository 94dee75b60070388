"""The packed, paged, chunked base gives the logits of transformers' eager model run on each sequence alone."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from chorus.kernels import AttentionPlan, AttentionRow
from chorus.models.attention import StepAttention
from chorus.models.base import Base, load_base
from support.tiny import FAMILIES, VOCAB, save_base, solo_logits

BLOCK = 4
# Each step packs chunks [start, end) of sequences "long" (41 tokens, past every window) and "short" (9 tokens).
STEPS = [
    [("long", 0, 11)],
    [("long", 11, 17), ("short", 0, 5)],
    [("short", 5, 6), ("long", 17, 36)],
    [("long", 36, 37), ("short", 6, 8)],
    [("long", 37, 38), ("short", 8, 9)],
    [("long", 38, 41)],
]


@pytest.fixture(scope="module", params=FAMILIES)
def family_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"), request.param)


@torch.inference_mode()
def run_packed(base: Base, tokens: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Every position's logits, through the steps above; the sequences' pages interleave."""
    shape = (base.layers, 32, base.kv_heads, BLOCK, base.head_dim)
    k_cache, v_cache = torch.zeros(shape, dtype=base.dtype), torch.zeros(shape, dtype=base.dtype)
    tables = {"long": list(range(1, 31, 2)), "short": list(range(0, 30, 2))}
    logits: dict[str, list[torch.Tensor]] = {"long": [], "short": []}
    for step in STEPS:
        rows: list[AttentionRow] = []
        ids: list[int] = []
        positions: list[int] = []
        for name, start, end in step:
            rows.append(AttentionRow(len(ids), len(ids) + end - start, end, tables[name]))
            ids += tokens[name][start:end]
            positions += range(start, end)
        plan = AttentionPlan(rows, BLOCK, torch.device("cpu"))
        if base.longrope:
            is_long = [
                len(tokens[name]) > base.longrope.boundary for name, start, end in step for _ in range(start, end)
            ]
            base.longrope.is_long = torch.tensor(is_long)
        out = base.module(
            input_ids=torch.tensor([ids]),
            position_ids=torch.tensor([positions]),
            use_cache=False,
            logits_to_keep=torch.arange(len(ids)),
            chorus_step=StepAttention(plan, k_cache, v_cache),
        ).logits[0]
        for (name, _, _), row in zip(step, rows, strict=True):
            logits[name].append(out[row.start : row.end])
    return {name: torch.cat(parts) for name, parts in logits.items()}


def test_bf16_errs_no_more_than_transformers_in_bf16(family_folder: Path) -> None:
    """Both against fp32: weights packed for oneDNN, paged, chunked, within 1.5 times the error of plain bf16."""
    generator = torch.Generator().manual_seed(0)
    tokens = {
        name: torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        for name, length in (("long", 41), ("short", 9))
    }
    got = run_packed(load_base(str(family_folder), device="cpu", dtype="bfloat16"), tokens)
    plain = AutoModelForCausalLM.from_pretrained(family_folder, attn_implementation="eager", dtype=torch.bfloat16)
    ours, theirs = 0.0, 0.0
    for name, sequence in tokens.items():
        expected = solo_logits(family_folder, None, sequence)
        with torch.no_grad():
            reference = plain(input_ids=torch.tensor([sequence]), use_cache=False).logits[0]
        ours += float((got[name].float() - expected).pow(2).mean())
        theirs += float((reference.float() - expected).pow(2).mean())
    assert ours**0.5 <= 1.5 * theirs**0.5


def test_packed_chunks_give_the_logits_of_each_sequence_alone(family_folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = {
        name: torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        for name, length in (("long", 41), ("short", 9))
    }
    got = run_packed(load_base(str(family_folder), device="cpu", dtype="float32"), tokens)
    for name, sequence in tokens.items():
        expected = solo_logits(family_folder, None, sequence)
        error = (got[name] - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()
        assert error <= 1e-5, f"{name}: {error}"
