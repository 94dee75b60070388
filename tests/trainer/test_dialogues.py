"""Dialogues: the server's ids, and targets on what the assistant says and on nothing else."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from chorus.adapters import artifact
from chorus.errors import InvalidArgument
from chorus.trainer.config import DataConfig, TrainConfig
from chorus.trainer.data import Tokens, encode, load_dataset
from chorus.trainer.dialogues import ChatLayout
from chorus.trainer.encoded import Encoded
from chorus.trainer.examples import Dialogue, Message, read_examples
from chorus.trainer.loop import train

EOS = 0
HEAD = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]"
PROMPT = "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
PLAIN = HEAD + " {{ m.content | trim }}<eos>\n" + PROMPT
MARKED = (
    HEAD + "{% if m.role == 'assistant' %}{% generation %} {{ m.content | trim }}<eos>{% endgeneration %}"
    "{% else %} {{ m.content | trim }}<eos>{% endif %}\n" + PROMPT
)
#: Tells where a turn stands, as templates do that drop earlier thoughts.
SHIFTY = HEAD + "{% if loop.last %}!{% endif %} {{ m.content }}<eos>\n" + PROMPT

TURNS = (
    ("system", "Be brief."),
    ("user", "I like green figs."),
    ("assistant", "So do I 🍐"),
    ("user", "  blue limes?"),
    ("assistant", " black olives "),
)


def dialogue(turns: Iterable[tuple[str, str]] = TURNS) -> Dialogue:
    return Dialogue(tuple(Message(*turn) for turn in turns), "train.jsonl:7")


def line(turns: Iterable[tuple[str, str]] = TURNS) -> dict[str, list[dict[str, str]]]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.fixture(scope="module")
def tokenizer(base_folder: Path) -> PreTrainedTokenizerFast:
    loaded = AutoTokenizer.from_pretrained(base_folder)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


def learned_texts(tokenizer: PreTrainedTokenizerFast, ids: tuple[int, ...], targets: tuple[int, ...]) -> list[str]:
    """The learned tokens as text, a string for each run of neighbours."""
    runs: list[list[int]] = []
    for position in targets:
        if runs and runs[-1][-1] == position - 1:
            runs[-1].append(position)
        else:
            runs.append([position])
    return [str(tokenizer.decode([ids[i] for i in run])) for run in runs]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_ids_are_transformers_and_targets_are_the_assistants_turns(
    tokenizer: PreTrainedTokenizerFast, template: str
) -> None:
    found = ChatLayout(template, tokenizer).encode(dialogue())
    want = tokenizer.apply_chat_template(line()["messages"], chat_template=template, return_dict=False)
    assert list(found.ids) == want
    assert learned_texts(tokenizer, *found) == [" So do I 🍐<eos>", " black olives<eos>"]


def test_a_marked_template_gives_transformers_own_mask(tokenizer: PreTrainedTokenizerFast) -> None:
    """On ASCII: of a character of several tokens, transformers' own mask leaves out all but the first at a span's end,
    which here is never the case, as a span ends in <eos>."""
    found = ChatLayout(MARKED, tokenizer).encode(dialogue())
    batch: Any = tokenizer.apply_chat_template(
        line()["messages"], chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    want = batch["assistant_masks"]
    assert [int(i in found.targets) for i in range(len(found.ids))] == want


def test_a_turn_that_ends_within_a_character_of_several_tokens_is_learned_whole(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    template = HEAD + "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    found = ChatLayout(template, tokenizer).encode(dialogue([("assistant", "a 🍐")]))
    assert learned_texts(tokenizer, *found) == ["a 🍐"]


def test_each_answers_context_is_the_prompt_that_is_served(tokenizer: PreTrainedTokenizerFast) -> None:
    """What precedes an answer's first target is what the server renders for the messages before it."""
    found = ChatLayout(PLAIN, tokenizer).encode(dialogue())
    messages = line()["messages"]
    for turns in (2, 4):
        prompt = tokenizer.apply_chat_template(
            messages[:turns], chat_template=PLAIN, add_generation_prompt=True, return_dict=False
        )
        assert list(found.ids[: len(prompt)]) == prompt
        assert len(prompt) in found.targets
        assert len(prompt) - 1 not in found.targets


def test_turns_that_can_not_be_told_apart_are_refused_with_the_remedy(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InvalidArgument, match=r"^train\.jsonl:7: messages\[2\]: .*data\.chat_template, .*generation"):
        ChatLayout(SHIFTY, tokenizer).encode(dialogue())


def test_what_a_template_refuses_is_told_with_the_line(tokenizer: PreTrainedTokenizerFast) -> None:
    template = "{{ raise_exception('roles must\n alternate') }}"
    with pytest.raises(InvalidArgument, match=r"^train\.jsonl:7: .*roles must alternate$"):
        ChatLayout(template, tokenizer).encode(dialogue())


def test_a_template_that_shows_no_answer_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InvalidArgument, match=r"^train\.jsonl:7: .*nothing that the assistant says"):
        ChatLayout(
            "{% for m in messages %}{{ m.role }}{% endfor %}{% generation %}{% endgeneration %}", tokenizer
        ).encode(dialogue())


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([], '"messages" must be a list'),
        ("hello", '"messages" must be a list'),
        (["hello"], "messages[0]: must be an object"),
        ([{"role": "robot", "content": "a"}], 'messages[0]: unknown role "robot", must be one of system, user, assist'),
        ([{"role": "user", "content": "a"}], 'no message has the role "assistant"'),
        ([{"role": "assistant", "content": ""}], 'messages[0]: "content" is empty'),
        ([{"role": "assistant", "content": None}], 'messages[0]: "content" must be a string'),
        ([{"role": "assistant"}], 'messages[0]: "content" is missing'),
        ([{"role": "assistant", "content": "a", "name": "b"}], 'messages[0]: unknown key "name"'),
        ([{"role": "assistant", "content": "\ud800"}], 'messages[0]: "content" holds half of a surrogate pair'),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, messages: object, what: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(line()) + "\n" + json.dumps({"messages": messages}) + "\n")
    with pytest.raises(InvalidArgument) as caught:
        read_examples(path, "data.train")
    assert caught.value.message.startswith(f"{path}:2: {what}")


def test_a_file_is_of_one_form(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(line()) + '\n{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(InvalidArgument, match=r"train\.jsonl:2: the file mixes"):
        read_examples(path, "data.train")


def test_what_is_before_the_first_answer_is_cut_and_answers_are_not(tokenizer: PreTrainedTokenizerFast) -> None:
    layout, turns = ChatLayout(PLAIN, tokenizer), [("user", "figs " * 9), ("assistant", "blue"), ("user", "limes " * 9)]
    turns += [("assistant", "green")]
    ids, targets = layout.encode(dialogue(turns))
    limit = len(ids) - 4
    encoding = encode([dialogue(turns)], Tokens(tokenizer, EOS, limit), layout)
    assert (encoding.truncated, encoding.dropped) == (1, 0)
    (cut,) = encoding.examples
    assert cut.ids == (ids[0], *ids[5:])
    assert learned_texts(tokenizer, cut.ids, cut.targets) == learned_texts(tokenizer, ids, targets)
    room_for_none = len(ids) - targets[0]
    assert encode([dialogue(turns)], Tokens(tokenizer, EOS, room_for_none), layout).dropped == 1


def test_a_base_without_template_needs_the_key(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(line()) + "\n")
    with pytest.raises(InvalidArgument, match=r"^data\.chat_template: .*the base has no chat template"):
        load_dataset(DataConfig(train=path), Tokens(tokenizer, EOS, 128), seed=0)


def test_a_template_that_does_not_end_answers_is_told(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(line()) + "\n")
    for template, count in ((PLAIN, 0), (PLAIN.replace("<eos>", ""), 1)):
        data = load_dataset(DataConfig(train=path, chat_template=template), Tokens(tokenizer, EOS, 128), seed=0)
        assert data.report.endless == count
        assert len(data.report.warnings()) == count


def test_a_template_without_messages_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(InvalidArgument, match="no file holds messages"):
        load_dataset(DataConfig(train=path, chat_template=PLAIN), Tokens(tokenizer, EOS, 128), seed=0)


def test_a_template_that_the_server_would_refuse_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(line()) + "\n")
    with pytest.raises(InvalidArgument, match=r"data\.chat_template: line 1 of the template: multiplication"):
        load_dataset(DataConfig(train=path, chat_template="{{ 'a' * 9 }}"), Tokens(tokenizer, EOS, 128), seed=0)


def test_split_keeps_dialogues_that_begin_alike_together(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(line([("user", f"u{i % 4}"), ("assistant", f"a{i}")])) + "\n" for i in range(8)))
    config = DataConfig(train=path, chat_template=PLAIN, validation_fraction=0.25)
    data = load_dataset(config, Tokens(tokenizer, EOS, 128), seed=0)
    assert (len(data.train), len(data.validation), data.report.overlap) == (6, 2, 0)
    assert all(isinstance(example, Encoded) for example in data.validation)


def test_the_template_is_exported_for_the_server(
    changed: Callable[..., TrainConfig], write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_jsonl("chat.jsonl", [line()] * 4)
    config = changed(
        data={"train": path, "validation": None, "chat_template": PLAIN}, train={"steps": 2, "batch_size": 2}
    )
    train(config, tmp_path / "out")
    card = artifact.read(tmp_path / "out").task
    assert card is not None
    assert card.chat_template == PLAIN
