"""README.md of an export: what was trained on what, how well it does, how to use it.

Knows the card's words. Same run, same bytes: no time, no path.
"""

import re
from collections.abc import Mapping

import yaml

from chorus.adapters.artifact import TaskCard
from chorus.trainer.base import EMBEDDED, Base
from chorus.trainer.config import TrainConfig
from chorus.trainer.data import DataReport

FILE_NAME = "README.md"

_TEXT = """\
---
{head}---

# LoRA adapter: {task}

Trained by Chorus {version} on the base model `{base}`. Only completions were learned, not prompts.

## What it goes with

| | SHA-256 |
|---|---|
| base model `{base}` | `{base_digest}` |
| tokenizer | `{tokenizer_digest}` |
| training data | `{data_digest}` |

The server refuses the adapter on any other base. {examples}

## How well it does

{metrics}

## Serve it with Chorus

{serve}

## Load it with peft

{peft}

## Config

{config}
"""
_METRICS = (
    ("loss per token", "validation_loss"),
    ("token accuracy", "validation_token_accuracy"),
    ("exact match (greedy)", "validation_exact_match"),
)


def model_card(base: Base, config: TrainConfig, card: TaskCard, data: DataReport) -> str:
    """The card, in Markdown; `card` brings digests and metrics."""
    return _TEXT.format(
        head=_head(base),
        task=_inline(card.task),
        version=card.trainer_version,
        base=_inline(base.name),
        base_digest=card.base_digest,
        tokenizer_digest=card.tokenizer_digest,
        data_digest=card.data_digest,
        examples=f"{data.train_examples} examples were learned, {data.validation_examples} were held out.",
        metrics=_metrics(card.metrics),
        serve=_serve(base),
        peft=_peft(base),
        config=_fenced("yaml", yaml.safe_dump(_settings(base, config), sort_keys=False, allow_unicode=True)),
    )


def _head(base: Base) -> str:
    """What hubs read. Only a hub's own name is a `base_model` there."""
    values: dict[str, object] = {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora", "chorus"]}
    if "/" in base.name:
        values["base_model"] = base.name
    return yaml.safe_dump(values, sort_keys=False)


def _metrics(metrics: Mapping[str, float]) -> str:
    lines = ["| on held-out data | base | adapter |", "|---|---|---|"]
    lines += [
        f"| {title} | {metrics[f'{name}_before']:.4f} | {metrics[name]:.4f} |"
        for title, name in _METRICS
        if name in metrics
    ]
    if len(lines) == 2:
        lines = ["Nothing was held out, so nothing was measured on unseen data."]
    return "\n".join([*lines, "", f"Training loss per token, over the last steps: {metrics['train_loss']:.4f}."])


def _serve(base: Base) -> str:
    model = "" if base.name == EMBEDDED else f" --model {base.name}"
    return _fenced(
        "sh",
        f"chorus serve{model}\n"
        "chorus adapters push . --tenant TENANT --name NAME\n"
        "chorus generate --adapter TENANT/NAME --prompt TEXT\n",
    )


def _peft(base: Base) -> str:
    embedded = base.name == EMBEDDED
    imports = ["from chorus.models import embedded\n"] if embedded else []
    return _fenced(
        "python",
        "".join(
            [
                *imports,
                "from peft import PeftModel\n",
                "from transformers import AutoModelForCausalLM\n",
                "\n",
                f"base = AutoModelForCausalLM.from_pretrained({'embedded.path()' if embedded else repr(base.name)})\n",
                'model = PeftModel.from_pretrained(base, ".")\n',
            ]
        ),
    )


def _settings(base: Base, config: TrainConfig) -> dict[str, object]:
    """The config as it was used, with files' names in place of their paths; a chat template is in task.json."""
    values: dict[str, object] = config.model_dump(mode="json", exclude_none=True)
    data = config.data.model_dump(mode="json", exclude_none=True, exclude={"chat_template"})
    paths = {"train": config.data.train, "validation": config.data.validation}
    return values | {"base": base.name, "data": data | {name: path.name for name, path in paths.items() if path}}


def _inline(text: str) -> str:
    return " ".join(text.replace("`", "'").split())


def _fenced(language: str, text: str) -> str:
    """A code block; its fence is longer than any that `text` holds."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}{fence}"
