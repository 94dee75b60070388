"""The demo's three tenants: their data, the recipe of each, their adapters."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import yaml

from chorus.trainer.config import TrainConfig
from chorus.trainer.records import OnProgress
from chorus.trainer.world.example import Example
from chorus.trainer.world.tenants import TENANTS, Tenant, make_examples

TRAIN_SEED, HELDOUT_SEED = 1, 2
VALIDATION_EXAMPLES = 32


@dataclass(frozen=True, slots=True)
class Trained:
    """One tenant's adapter folder, and how long and how well it was trained."""

    tenant: Tenant
    folder: Path
    seconds: float
    validation_loss_before: float
    validation_loss: float


def heldout(tenant: Tenant, count: int) -> list[Example]:
    """Examples that no training has seen; the same prompts for every tenant."""
    return make_examples(tenant, HELDOUT_SEED, count, "heldout")


def train_all(folder: Path, on_progress: Callable[[Tenant], OnProgress]) -> list[Trained]:
    """Trains every tenant's adapter on the embedded base, with the recipes that ship beside the generators."""
    from chorus.trainer.loop import train

    trained = []
    for tenant in TENANTS:
        result = train(_config(folder, tenant), folder / tenant, on_progress(tenant))
        assert result.validation_loss is not None
        assert result.validation_loss_before is not None
        trained.append(
            Trained(tenant, result.output, result.seconds, result.validation_loss_before, result.validation_loss)
        )
    return trained


def _config(folder: Path, tenant: Tenant) -> TrainConfig:
    recipe = yaml.safe_load((files("chorus.trainer.world") / "recipes" / f"{tenant}.yaml").read_text())
    one_epoch = recipe["train"]["steps"] * recipe["train"]["batch_size"]
    sets = {
        "train": make_examples(tenant, TRAIN_SEED, one_epoch),
        "validation": make_examples(tenant, HELDOUT_SEED + 1, VALIDATION_EXAMPLES, "heldout"),
    }
    for name, rows in sets.items():
        path = folder / f"{tenant}-{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe["data"][name] = str(path)
    return TrainConfig.model_validate(recipe)
