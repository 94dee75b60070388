"""From JSONL to targets: nothing lost in silence, nothing learned but completions."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from chorus.errors import InvalidArgument
from chorus.trainer.batches import IGNORED, Batch, collate, evaluation_batches, steps_per_epoch, training_batches
from chorus.trainer.config import DataConfig
from chorus.trainer.data import Tokens, encode, load_dataset
from chorus.trainer.encoded import Encoded
from chorus.trainer.examples import Example, read_examples, split

EOS = 0

encoded_examples = st.lists(
    st.builds(
        lambda ids, cut: Encoded.after_prompt(tuple(ids), 1 + cut % (len(ids) - 1)),
        st.lists(st.integers(1, 99), min_size=2, max_size=12),
        st.integers(0, 100),
    ),
    min_size=1,
    max_size=40,
)


@pytest.fixture(scope="module")
def tokenizer(base_folder: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base_folder)
    return loaded


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"\xff", "not UTF-8"),
        (b"[1]", "must be an object"),
        (b'{"prompt": "a"}', '"completion" is missing'),
        (b'{"prompt": "a", "completion": 3}', '"completion" must be a string'),
        (b'{"prompt": "", "completion": "b"}', '"prompt" is empty'),
        (b'{"prompt": "a", "completion": "b", "weight": 2}', 'unknown key "weight"'),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: bytes, what: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "b"}\n\n' + line + b"\n")
    with pytest.raises(InvalidArgument) as caught:
        read_examples(path, "data.train")
    assert caught.value.message.startswith(f"{path}:3: ")
    assert what in caught.value.message
    assert caught.value.violations[0].field == "data.train"


def test_a_file_without_examples_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("\n\n")
    with pytest.raises(InvalidArgument, match="no examples"):
        read_examples(path, "data.train")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"data\.validation: .*gone\.jsonl: No such file"):
        read_examples(tmp_path / "gone.jsonl", "data.validation")


def test_ids_are_prompt_then_completion_then_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt, completion = "Message 1: I like", " green figs"
    encoding = encode([Example(prompt, completion)], Tokens(tokenizer, EOS, 64))
    want_prompt, want_completion = tokenizer.encode(prompt), tokenizer.encode(completion)
    assert encoding.examples == [Encoded.after_prompt((*want_prompt, *want_completion, EOS), len(want_prompt))]
    assert (encoding.truncated, encoding.dropped) == (0, 0)


def test_a_long_prompt_loses_its_beginning_and_a_long_completion_its_example(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    prompt, completion = tokenizer.encode("I like green figs. " * 3), tokenizer.encode(" blue")
    limit = len(completion) + 1 + 5
    encoding = encode(
        [Example("I like green figs. " * 3, " blue"), Example("Reply:", " olives and so" * 20)],
        Tokens(tokenizer, EOS, limit),
    )
    assert encoding.examples == [Encoded.after_prompt((*prompt[-5:], *completion, EOS), 5)]
    assert (encoding.truncated, encoding.dropped) == (1, 1)


def test_a_truncated_prompt_keeps_its_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    encoding = encode([Example("<bos>" + "I like green figs. " * 3, " blue")], Tokens(tokenizer, EOS, 10))
    (example,) = encoding.examples
    assert example.ids[0] == tokenizer.bos_token_id
    assert len(example.ids) == 10


def test_what_was_cut_dropped_or_shared_is_reported(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    train, valid = tmp_path / "t.jsonl", tmp_path / "v.jsonl"
    fits, long_prompt, long_completion = ("a", " b"), ("x" * 50, " b"), ("c", "y" * 50)
    train.write_text("".join(jsonl(*pair) for pair in (fits, long_prompt, long_completion)))
    valid.write_text(jsonl(*fits) + jsonl("new", " b"))
    dataset = load_dataset(DataConfig(train=train, validation=valid), Tokens(tokenizer, EOS, 20), seed=0)
    report = dataset.report
    assert (report.train_examples, report.validation_examples) == (2, 2)
    assert (report.truncated, report.dropped, report.overlap) == (1, 1, 1)
    assert [line.split()[0] for line in report.warnings()] == ["1", "1", "1"]


def jsonl(prompt: str, completion: str) -> str:
    return json.dumps({"prompt": prompt, "completion": completion}) + "\n"


def test_nothing_left_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"prompt": "a", "completion": " and so and so and so"}\n')
    with pytest.raises(InvalidArgument, match=r"data\.max_length \(3 tokens\), nothing is left"):
        load_dataset(DataConfig(train=path), Tokens(tokenizer, EOS, 3), seed=0)


def test_split_holds_out_whole_prompts_and_depends_on_the_seed_alone() -> None:
    examples = [Example(f"p{i % 20}", f"c{i}") for i in range(40)]
    train, held_out = split(examples, 0.25, seed=3)
    assert len({e.prompt for e in held_out}) == 5
    assert not {e.prompt for e in train} & {e.prompt for e in held_out}
    assert sorted(train + held_out) == sorted(examples)
    assert split(examples, 0.25, seed=3) == (train, held_out)
    assert split(examples, 0.25, seed=4) != (train, held_out)


def test_split_leaves_something_to_train_on() -> None:
    with pytest.raises(InvalidArgument, match="leaves nothing to train on"):
        split([Example("p", "a"), Example("p", "b")], 0.5, seed=0)


@given(encoded_examples)
def test_every_target_is_the_next_token_of_a_completion(examples: list[Encoded]) -> None:
    batch = collate(examples, pad=7)
    for row, example in enumerate(examples):
        found = {
            column + 1: target
            for column, target in zip(batch.columns.tolist(), batch.targets[row].tolist(), strict=True)
            if target != IGNORED
        }
        assert found == {i: example.ids[i] for i in example.targets}
        assert tuple(batch.input_ids[row, : len(example.ids)].tolist()) == example.ids
    assert batch.target_tokens == int((batch.targets != IGNORED).sum())


@given(encoded_examples, st.integers(1, 7), st.integers(0, 3))
def test_each_pass_sees_every_example_once(examples: list[Encoded], batch_size: int, seed: int) -> None:
    steps = steps_per_epoch(len(examples), batch_size)
    batches = training_batches(examples, batch_size, 7, seed)
    for _ in range(2):
        rows = [row for _ in range(steps) for row in collated_rows(next(batches))]
        assert sorted(rows) == sorted(example.ids for example in examples)


def test_order_depends_on_the_seed_and_the_pass() -> None:
    examples = [Encoded.after_prompt((1, i + 2), 1) for i in range(32)]

    def passes(seed: int) -> list[list[int]]:
        batches = training_batches(examples, 4, 0, seed)
        return [[int(row[1]) for _ in range(8) for row in next(batches).input_ids] for _ in range(2)]

    first, second = passes(0)
    assert first != second
    assert passes(0) == [first, second]
    assert passes(1) != [first, second]


def test_batches_hold_similar_lengths() -> None:
    examples = [Encoded.after_prompt(tuple(range(1, 3 + i % 50)), 1) for i in range(400)]
    batches = training_batches(examples, 16, 0, seed=0)
    taken = [next(batches) for _ in range(25)]
    padding = sum(batch.input_ids.numel() - batch.tokens for batch in taken)
    assert padding < 0.1 * sum(batch.tokens for batch in taken)


def test_evaluation_is_one_pass() -> None:
    examples = [Encoded.after_prompt(tuple(range(1, 3 + i % 9)), 1) for i in range(20)]
    rows = [row for batch in evaluation_batches(examples, 6, 0) for row in collated_rows(batch)]
    assert sorted(rows) == sorted(example.ids for example in examples)


def collated_rows(batch: Batch) -> list[tuple[int, ...]]:
    """The rows of a batch without their padding; every row's last target is its last token."""
    ends = [int(batch.columns[(row != IGNORED).nonzero().max()]) + 2 for row in batch.targets]
    return [tuple(ids[:end].tolist()) for ids, end in zip(batch.input_ids, ends, strict=True)]


def test_batch_moves_whole() -> None:
    batch = collate([Encoded.after_prompt((1, 2, 3), 1)], 0).to(torch.device("meta"))
    assert {batch.input_ids.device.type, batch.columns.device.type, batch.targets.device.type} == {"meta"}
