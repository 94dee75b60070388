"""From JSONL files to token ids with completion-only targets.

Knows the file format, tokenisation and length limits. Does not know batches (`batches`) or the model.

    prompt ids                  completion ids   EOS
    |--- no target, no loss ---||--- targets -------|

Prompt and completion are tokenised apart and then joined, because that is what serving does: the completion's tokens
are generated after the prompt's, so no token ever spans the seam.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from chorus.errors import FailedPrecondition, InvalidArgument
from chorus.trainer.config import DataConfig

FIELDS = ("prompt", "completion")


class Example(NamedTuple):
    """A whole prompt, and the text that should follow it."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of prompt, completion and EOS; the loss is taken on ids[prompt_length:]."""

    ids: tuple[int, ...]
    prompt_length: int


class Encoding(NamedTuple):
    """What `encode` kept, and what it had to do to fit the length limit."""

    examples: list[Encoded]
    truncated: int
    dropped: int


@dataclass(frozen=True, slots=True)
class DataReport:
    """What became of the data. `truncated`: prompts cut from the left; `dropped`: completions too long to fit;
    `overlap`: validation prompts that are also trained on. Counted over both sets."""

    train_examples: int
    validation_examples: int
    truncated: int
    dropped: int
    overlap: int
    max_length: int

    def warnings(self) -> list[str]:
        """One line for each thing the model owner should know."""
        limit = f"data.max_length ({self.max_length} tokens)"
        lines = []
        if self.truncated:
            lines.append(f"{self.truncated} prompts were cut from the left to fit {limit}")
        if self.dropped:
            lines.append(f"{self.dropped} examples were left out: their completions alone exceed {limit}")
        if self.overlap:
            lines.append(
                f"{self.overlap} of {self.validation_examples} validation prompts are also in the training data"
            )
        return lines


@dataclass(frozen=True, slots=True)
class Dataset:
    """Encoded examples of both sets, the report, and the SHA-256 (hex) of the training file's bytes."""

    train: list[Encoded]
    validation: list[Encoded]
    report: DataReport
    digest: str


def load_dataset(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, eos: int, max_length: int, seed: int
) -> Dataset:
    """Reads, splits and encodes the examples; `seed` decides the split where `validation_fraction` asks for one.

    Raises:
        InvalidArgument: an unreadable or empty file, a bad line, or nothing left to train or validate on.
    """
    raw = _read_bytes(config.train, "data.train")
    train = parse_examples(raw, config.train, "data.train")
    validation: list[Example] = []
    if config.validation is not None:
        validation = read_examples(config.validation, "data.validation")
    elif config.validation_fraction is not None:
        train, validation = split(train, config.validation_fraction, seed)
    learned = _encode_some(train, tokenizer, eos, max_length, "data.train")
    measured = _encode_some(validation, tokenizer, eos, max_length, "data.validation")
    trained_prompts = {example.prompt for example in train}
    report = DataReport(
        train_examples=len(learned.examples),
        validation_examples=len(measured.examples),
        truncated=learned.truncated + measured.truncated,
        dropped=learned.dropped + measured.dropped,
        overlap=sum(example.prompt in trained_prompts for example in validation),
        max_length=max_length,
    )
    return Dataset(learned.examples, measured.examples, report, hashlib.sha256(raw).hexdigest())


def read_examples(path: Path, field: str) -> list[Example]:
    """The examples of a JSONL file; `field` is the config key to blame.

    Raises:
        InvalidArgument: naming the file, the line (from 1) and what is wrong with it.
    """
    return parse_examples(_read_bytes(path, field), path, field)


def parse_examples(raw: bytes, path: Path, field: str) -> list[Example]:
    """Like `read_examples`, from bytes in memory; `path` is for messages. Blank lines are skipped."""
    examples = []
    for number, line in enumerate(raw.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            examples.append(_parse_line(line))
        except ValueError as error:
            raise InvalidArgument(f"{path}:{number}: {error}", reason="BAD_DATA", field=field) from None
    if not examples:
        raise InvalidArgument(f"{path}: no examples in it", reason="BAD_DATA", field=field)
    return examples


def split(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Holds out `fraction` of the distinct prompts, so that no prompt is on both sides.

    Raises:
        InvalidArgument: nothing would be left to train on.
    """
    prompts = list(dict.fromkeys(example.prompt for example in examples))
    count = max(1, round(len(prompts) * fraction))
    if count >= len(prompts):
        raise InvalidArgument(
            f"data.validation_fraction: {fraction} of {len(prompts)} distinct prompts leaves nothing to train on",
            reason="BAD_DATA",
            field="data.validation_fraction",
        )
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = {prompts[i] for i in order[:count]}
    return [e for e in examples if e.prompt not in held_out], [e for e in examples if e.prompt in held_out]


def encode(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, eos: int, max_length: int) -> Encoding:
    """Tokenises; cuts an over-long prompt from the left (a BOS stays), never a completion.

    An example whose completion and EOS leave no room for one prompt token is dropped and counted.
    """
    if not examples:
        return Encoding([], 0, 0)
    prompts = _token_ids(tokenizer, [example.prompt for example in examples], special=True)
    completions = _token_ids(tokenizer, [example.completion for example in examples], special=False)
    kept, truncated, dropped = [], 0, 0
    for prompt, completion in zip(prompts, completions, strict=True):
        room = max_length - len(completion) - 1
        if room < 1:
            dropped += 1
            continue
        head = prompt[:1] if prompt[0] == tokenizer.bos_token_id and room > 1 else []
        fitting = prompt if len(prompt) <= room else head + prompt[len(prompt) - room + len(head) :]
        truncated += len(prompt) > room
        kept.append(Encoded((*fitting, *completion, eos), len(fitting)))
    return Encoding(kept, truncated, dropped)


def _encode_some(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, eos: int, max_length: int, field: str
) -> Encoding:
    encoding = encode(examples, tokenizer, eos, max_length)
    if examples and not encoding.examples:
        raise InvalidArgument(
            f"{field}: every completion exceeds data.max_length ({max_length} tokens), nothing is left",
            reason="BAD_DATA",
            field=field,
        )
    return encoding


def _token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, special: bool) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
    if any(not row for row in ids):
        raise FailedPrecondition("the base's tokenizer turns a non-empty text into no tokens", reason="BAD_TOKENIZER")
    return ids


def _read_bytes(path: Path, field: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidArgument(f"{field}: {path}: {error.strerror or error}", reason="BAD_DATA", field=field) from None


def _parse_line(line: bytes) -> Example:
    try:
        value: Any = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not valid JSON: nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError('must be an object like {"prompt": "...", "completion": "..."}')
    for name in FIELDS:
        if name not in value:
            raise ValueError(f'"{name}" is missing')
        if not isinstance(value[name], str):
            raise ValueError(f'"{name}" must be a string')
        if not value[name]:
            raise ValueError(f'"{name}" is empty')
    if unknown := sorted(value.keys() - set(FIELDS)):
        raise ValueError(f'unknown key "{unknown[0]}" (only "prompt" and "completion" are read)')
    return Example(value["prompt"], value["completion"])
