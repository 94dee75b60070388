"""What a run would do, before anybody waits for it: parameters, memory, tokens, and what is learned of three examples.

Sets everything up as `train` does, base, data and adapter, and stops before the first step. Writes nothing.

Memory while training, bytes:

    weights        the frozen base in its own type
    adapter        trainable parameters * 4
    gradients      trainable parameters * 4
    optimizer      trainable parameters * 8      AdamW's two moments
    activations    estimated: tokens of the largest batch * (features into and out of every linear) * bytes of the
                   base's type, and its predicted columns * vocabulary * 8 for logits and their gradient
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from chorus.trainer.batches import collate, steps_per_epoch
from chorus.trainer.config import TrainConfig
from chorus.trainer.data import DataReport
from chorus.trainer.encoded import Encoded
from chorus.trainer.loop import Setup, pick_device, seeded, set_up

SAMPLES = 3
_FLOAT32 = 4


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes; `activations` is an estimate, the others are exact."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of tokens that are all learned, or all not."""

    text: str
    learned: bool


@dataclass(frozen=True, slots=True)
class DryRun:
    """What `train` would have begun with. `samples` are the first examples, or rows of packed ones, as the model sees
    them; `learned_tokens_per_epoch` are those that the loss is taken on."""

    trainable_parameters: int
    base_parameters: int
    memory: Memory
    examples: int
    tokens_per_epoch: int
    learned_tokens_per_epoch: int
    steps_per_epoch: int
    steps: int
    samples: tuple[tuple[Piece, ...], ...]
    data: DataReport


def dry_run(config: TrainConfig) -> DryRun:
    """Raises what `train` raises before its first step."""
    device = pick_device(config.train.device)
    with seeded(config.train.seed, device):
        run = set_up(config, device)
    rows, size = run.data.train, config.train.batch_size
    trainable = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    return DryRun(
        trainable_parameters=trainable,
        base_parameters=run.base_parameters,
        memory=_memory(run, trainable, size),
        examples=run.data.report.train_examples,
        tokens_per_epoch=sum(len(row.ids) for row in rows),
        learned_tokens_per_epoch=sum(len(row.targets) for row in rows),
        steps_per_epoch=-(-steps_per_epoch(len(rows), size) // config.train.gradient_accumulation),
        steps=run.steps,
        samples=tuple(tuple(_pieces(row, run)) for row in rows[:SAMPLES]),
        data=run.data.report,
    )


def _memory(run: Setup, trainable: int, batch_size: int) -> Memory:
    frozen = [p for p in run.model.parameters() if not p.requires_grad]
    return Memory(
        weights=sum(p.numel() * p.element_size() for p in frozen),
        adapter=trainable * _FLOAT32,
        gradients=trainable * _FLOAT32,
        optimizer=2 * trainable * _FLOAT32,
        activations=_activations(run, batch_size),
    )


def _activations(run: Setup, batch_size: int) -> int:
    longest = sorted(run.data.train, key=lambda row: -len(row.ids))[:batch_size]
    batch = collate(longest, run.base.pad)
    kept = sum(_features(module) for module in run.base.module.modules())
    itemsize = next(run.base.module.parameters()).element_size()
    vocabulary: int = run.base.module.config.get_text_config().vocab_size
    return batch.input_ids.numel() * kept * itemsize + batch.targets.numel() * vocabulary * 2 * _FLOAT32


def _features(module: nn.Module) -> int:
    """In and out of a linear layer; of LoRA's own, too, which are few."""
    if not isinstance(module, nn.Linear | Conv1D) or not isinstance(module.weight, torch.Tensor):
        return 0
    return sum(module.weight.shape)


def _pieces(row: Encoded, run: Setup) -> Iterator[Piece]:
    targets = frozenset(row.targets)
    for learned, positions in groupby(range(len(row.ids)), key=lambda i: i in targets):
        ids = [row.ids[i] for i in positions]
        yield Piece(str(run.base.tokenizer.decode(ids, skip_special_tokens=False)), learned)
