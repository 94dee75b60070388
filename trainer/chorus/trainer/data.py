"""From examples to token ids with targets, and what became of the data.

Knows tokenisation and length limits. Does not know files (`examples`), templates (`dialogues`), batches or the model.

    prompt ids                  completion ids   EOS
    |--- no target, no loss ---||--- targets -------|

Prompt and completion are tokenised apart and then joined, because that is what serving does: the completion's tokens
are generated after the prompt's, so no token ever spans the seam. Of a dialogue, the assistant's turns are targets.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from chorus.errors import FailedPrecondition, InvalidArgument
from chorus.trainer.config import DataConfig
from chorus.trainer.dialogues import ChatLayout, template_for
from chorus.trainer.encoded import Encoded
from chorus.trainer.examples import AnyExample, Dialogue, Example, parse_examples, read_bytes, read_examples, split
from chorus.trainer.packing import fill, pack


class Encoding(NamedTuple):
    """What `encode` kept, and what it had to do to fit the length limit."""

    examples: list[Encoded]
    truncated: int
    dropped: int


@dataclass(frozen=True, slots=True)
class DataReport:
    """What became of the data. `truncated`: prompts cut from the left; `dropped`: completions too long to fit;
    `overlap`: validation prompts (beginnings of dialogues) that are also trained on; `endless`: dialogues whose last
    target is no token that the base stops at. Counted over both sets. `train_rows`: examples, or packed rows of them;
    `packing`: how full those are of `max_length` tokens, None without."""

    train_examples: int
    validation_examples: int
    truncated: int
    dropped: int
    overlap: int
    max_length: int
    endless: int
    train_rows: int
    packing: float | None

    def packed(self) -> str | None:
        """How well packing did, None without it."""
        if self.packing is None:
            return None
        return (
            f"packing: {self.train_examples:,} examples in {self.train_rows:,} rows, "
            f"{self.packing:.1%} of their {self.max_length:,} tokens each used"
        )

    def warnings(self) -> list[str]:
        """One line for each thing the model owner should know."""
        limit = f"data.max_length ({self.max_length} tokens)"
        lines = []
        if self.truncated:
            lines.append(f"{self.truncated} prompts were cut from the left to fit {limit}")
        if self.dropped:
            lines.append(f"{self.dropped} examples were left out: what is learned of them alone exceeds {limit}")
        if self.overlap:
            lines.append(
                f"{self.overlap} of {self.validation_examples} validation prompts are also in the training data"
            )
        if self.endless:
            lines.append(
                f"{self.endless} dialogues teach no end: what the chat template ends the assistant's last turn with "
                "is no token that the base stops at"
            )
        return lines


@dataclass(frozen=True, slots=True)
class Dataset:
    """Encoded examples of both sets, those to learn from packed if `data.packing`; the report; the SHA-256 (hex) of the
    training file's bytes; and the template that laid dialogues out, None where there are none."""

    train: list[Encoded]
    validation: list[Encoded]
    report: DataReport
    digest: str
    chat_template: str | None = None


@dataclass(frozen=True, slots=True)
class Tokens:
    """What encoding needs to know. `stops`: the ids at which the base's answers end; `eos` is put after completions."""

    tokenizer: PreTrainedTokenizerBase
    eos: int
    max_length: int
    stops: frozenset[int] = frozenset()


def load_dataset(config: DataConfig, tokens: Tokens, seed: int) -> Dataset:
    """Reads, splits and encodes the examples; `seed` decides the split where `validation_fraction` asks for one.

    Raises:
        InvalidArgument: an unreadable or empty file, a bad line, no chat template for dialogues or one that can not
            lay them out, or nothing left to train or validate on.
    """
    raw = read_bytes(config.train, "data.train")
    train = parse_examples(raw, config.train, "data.train")
    validation: list[AnyExample] = []
    if config.validation is not None:
        validation = read_examples(config.validation, "data.validation")
    elif config.validation_fraction is not None:
        train, validation = split(train, config.validation_fraction, seed)
    template = _template(config, tokens, [*train[:1], *validation[:1]])
    layout = ChatLayout(template, tokens.tokenizer) if template is not None else None
    learned = _encode_some(train, tokens, layout, "data.train")
    measured = _encode_some(validation, tokens, layout, "data.validation")
    beginnings = {example.beginning for example in train}
    rows = pack(learned.examples, tokens.max_length, seed) if config.packing else learned.examples
    report = DataReport(
        train_examples=len(learned.examples),
        validation_examples=len(measured.examples),
        truncated=learned.truncated + measured.truncated,
        dropped=learned.dropped + measured.dropped,
        overlap=sum(example.beginning in beginnings for example in validation),
        max_length=tokens.max_length,
        endless=_endless(train, learned, tokens) + _endless(validation, measured, tokens),
        train_rows=len(rows),
        packing=fill(rows, tokens.max_length) if config.packing else None,
    )
    return Dataset(rows, measured.examples, report, hashlib.sha256(raw).hexdigest(), template)


def encode(examples: Sequence[AnyExample], tokens: Tokens, layout: ChatLayout | None = None) -> Encoding:
    """Tokenises; cuts an over-long prompt from the left (a BOS stays), never what is learned.

    An example whose targets, and what is between them, leave no room for one token before them is dropped and counted.
    Dialogues need `layout`.
    """
    kept, truncated, dropped = [], 0, 0
    for whole in _whole(examples, tokens, layout):
        fitting = _fitting(whole, tokens.max_length, tokens.tokenizer.bos_token_id)
        if fitting is None:
            dropped += 1
            continue
        truncated += len(fitting.ids) < len(whole.ids)
        kept.append(fitting)
    return Encoding(kept, truncated, dropped)


def _whole(examples: Sequence[AnyExample], tokens: Tokens, layout: ChatLayout | None) -> Iterator[Encoded]:
    """The examples in tokens, as long as they are."""
    dialogues = [example for example in examples if isinstance(example, Dialogue)]
    if dialogues:
        assert layout is not None
        yield from (Encoded(*layout.encode(dialogue)) for dialogue in dialogues)
    pairs = [example for example in examples if isinstance(example, Example)]
    if pairs:
        prompts = _token_ids(tokens.tokenizer, [pair.prompt for pair in pairs], special=True)
        completions = _token_ids(tokens.tokenizer, [pair.completion for pair in pairs], special=False)
        for prompt, completion in zip(prompts, completions, strict=True):
            yield Encoded.after_prompt((*prompt, *completion, tokens.eos), len(prompt))


def _fitting(whole: Encoded, max_length: int, bos: int | None) -> Encoded | None:
    """`whole` with as much before its first target as fits; None where nothing does."""
    ids, first = whole.ids, whole.targets[0]
    room = max_length - (len(ids) - first)
    if room < 1:
        return None
    if first <= room:
        return whole
    head = ids[:1] if ids[0] == bos and room > 1 else ()
    shift = first - room
    return Encoded((*head, *ids[shift + len(head) :]), tuple(position - shift for position in whole.targets))


def _template(config: DataConfig, tokens: Tokens, firsts: Sequence[AnyExample]) -> str | None:
    """The template, where any file holds dialogues; `firsts` are the files' first examples."""
    if any(isinstance(example, Dialogue) for example in firsts):
        return template_for(config.chat_template, tokens.tokenizer)
    if config.chat_template is not None:
        raise InvalidArgument(
            "data.chat_template: is set, and no file holds messages; remove it",
            reason="BAD_DATA",
            field="data.chat_template",
        )
    return None


def _endless(examples: Sequence[AnyExample], encoding: Encoding, tokens: Tokens) -> int:
    if not examples or isinstance(examples[0], Example):
        return 0
    stops = tokens.stops | {tokens.eos}
    return sum(example.ids[example.targets[-1]] not in stops for example in encoding.examples)


def _encode_some(examples: Sequence[AnyExample], tokens: Tokens, layout: ChatLayout | None, field: str) -> Encoding:
    encoding = encode(examples, tokens, layout)
    if examples and not encoding.examples:
        raise InvalidArgument(
            f"{field}: every completion exceeds data.max_length ({tokens.max_length} tokens), nothing is left",
            reason="BAD_DATA",
            field=field,
        )
    return encoding


def _token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, special: bool) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
    if any(not row for row in ids):
        raise FailedPrecondition("the base's tokenizer turns a non-empty text into no tokens", reason="BAD_TOKENIZER")
    return ids
