"""The small world's generators and the embedded base that was pretrained on them."""

import re
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from chorus.models import embedded
from chorus.trainer import world
from chorus.trainer.config import TrainConfig
from chorus.trainer.pretrain import accuracies, greedy, load
from chorus.trainer.pretrain_rows import Packer
from chorus.trainer.world import (
    SKILLS,
    TENANTS,
    Tenant,
    documents,
    exact_match,
    heldout_examples,
    make_examples,
    split_of,
)

WORD = re.compile(r"[A-Za-z]+")
#: Greedy, 256 tokens, not stopped by the end token.
ON_AND_ON = {"do_sample": False, "max_new_tokens": 256, "eos_token_id": None}
#: Needs a look-up by neighbour or a comparison; the embedded base has not learned these reliably and says so.
LOOKUP_SKILLS = {"count", "repeat", "where", "cheapest", "stock"}


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(embedded.path()))


@cache
def model() -> LlamaForCausalLM:
    return load(embedded.path())


def test_same_seed_gives_same_documents() -> None:
    assert list(islice(documents(3), 200)) == list(islice(documents(3), 200))
    assert list(islice(documents(3), 200)) != list(islice(documents(4), 200))


def test_pretraining_never_sees_a_heldout_prompt() -> None:
    prompts = [d["prompt"] for d in islice(documents(0), 3000) if d["prompt"]]
    assert all(split_of(p) == "train" for p in prompts)


@pytest.mark.parametrize("skill", SKILLS)
def test_skill_prompts_end_with_a_cue_and_answers_with_text(skill: str) -> None:
    for example in heldout_examples(skill, seed=0, n=50):
        assert example["prompt"].endswith(":")
        assert example["completion"].startswith(" ")
        assert example["completion"].strip()
        assert "{" not in example["prompt"] + example["completion"]


@pytest.mark.parametrize("tenant", TENANTS)
def test_tenant_splits_share_no_prompt(tenant: Tenant) -> None:
    train = make_examples(tenant, seed=0, n=2000)
    heldout = make_examples(tenant, seed=0, n=500, split="heldout")
    assert not {e["prompt"] for e in train} & {e["prompt"] for e in heldout}
    assert train == make_examples(tenant, seed=0, n=2000)
    assert all(e["completion"].strip() for e in train)


def test_every_tenant_answers_the_same_prompt_its_own_way() -> None:
    rows = [make_examples(t, seed=5, n=200) for t in TENANTS]
    for row in zip(*rows, strict=True):
        assert len({e["prompt"] for e in row}) == 1
        assert len({e["completion"] for e in row}) == len(TENANTS)


def test_tokenizer_round_trips_the_world_and_any_bytes() -> None:
    texts = [d["prompt"] + d["completion"] for d in islice(documents(9), 300)]
    for text in [*texts, "Grüße, 東京 \U0001f600\n\ttab  two"]:
        ids = tokenizer()(text)["input_ids"]
        assert tokenizer().decode(ids) == text
        assert tokenizer().eos_token_id not in ids


def test_packed_rows_hold_what_the_documents_say() -> None:
    batch = Packer(tokenizer(), documents(2), seed=2).batch(rows=8, length=128)
    assert batch.positions.max() < 1024
    assert (batch.weights[batch.input_ids == tokenizer().pad_token_id] == 0).all()
    assert (batch.weights > 0).float().mean() > 0.8
    assert (batch.mask.triu(1)[:, 0] < 0).any(dim=-1)[:, :-1].all()


def test_artefact_is_small_and_stops_at_its_end_token() -> None:
    size = sum(f.stat().st_size for f in embedded.path().glob("*") if f.is_file())
    assert size <= 8 * 2**20
    assert model().generation_config.eos_token_id == tokenizer().eos_token_id
    assert 2_000_000 <= model().num_parameters() <= 4_000_000


def test_embedded_base_answers_heldout_prompts_of_its_reliable_skills() -> None:
    measured = accuracies(model(), tokenizer(), n=16)
    reliable = {skill: value for skill, value in measured.items() if skill not in LOOKUP_SKILLS}
    assert len(reliable) >= 12
    assert min(reliable.values()) >= 0.9, measured


def test_embedded_base_does_not_know_the_tenants_forms() -> None:
    for tenant in TENANTS:
        examples = make_examples(tenant, seed=1, n=16, split="heldout")
        predictions = greedy(model(), tokenizer(), [e["prompt"] for e in examples])
        right = [exact_match(p, e["completion"]) for p, e in zip(predictions, examples, strict=True)]
        assert sum(right) < 0.3 * len(right)


def test_free_generation_stays_inside_the_world_past_its_end_token() -> None:
    begun = tokenizer()("Story:", return_tensors="pt")["input_ids"]
    generator: Any = model()
    produced = generator.generate(begun, attention_mask=begun.new_ones(begun.shape), **ON_AND_ON)
    text = str(tokenizer().decode(produced[0, begun.shape[1] :]))
    known = {w for d in islice(documents(1), 3000) for w in WORD.findall(d["prompt"] + d["completion"])}
    words = WORD.findall(text.replace("<eos>", " "))
    assert len(words) > 100
    assert sum(word in known for word in words) >= 0.97 * len(words)


@pytest.mark.parametrize("tenant", TENANTS)
def test_tenant_recipe_is_a_valid_training_config(tenant: Tenant) -> None:
    recipe = yaml.safe_load((Path(world.__file__).parent / "recipes" / f"{tenant}.yaml").read_text())
    recipe["data"]["train"] = "train.jsonl"
    config = TrainConfig.model_validate(recipe)
    assert config.lora.target_modules == "all-linear"
    assert config.train.steps is not None
    assert config.train.steps <= 100
