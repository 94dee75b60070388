"""Dialogues over a real port: what the engine gets is what transformers' `apply_chat_template` gives."""

import asyncio
import json
import time
from dataclasses import replace
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from chorus.engine.messages import Submit
from chorus.v1 import generate_pb2, inference_pb2
from services.fakes import EOS, FACTS, byte_tokenizer
from services.harness import MakeRig, Refusal, Rig, refused

BASE = (
    "{{ eos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message.content | trim }}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
OWN = "{% for message in messages %}[{{ message.role[0] | upper }}] {{ message.content }} {% endfor %}[A]"
DIALOGUE = [
    {"role": "system", "content": " You are kind. "},
    {"role": "user", "content": "größe 日本\n?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "and <eos> now"},
]
ADAPTER = "tenants/a/adapters/x"


def messages(dialogue: list[dict[str, str]] = DIALOGUE) -> generate_pb2.Messages:
    return generate_pb2.Messages(messages=[generate_pb2.Message(**message) for message in dialogue])


def tokenizer_that_adds_a_token(chat_template: str | None) -> PreTrainedTokenizerFast:
    """Puts a special token before every text, as Llama's does, and as the template above does too."""
    tokenizer = byte_tokenizer(chat_template)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", pair="<eos> $A $B", special_tokens=[("<eos>", EOS)]
    )
    return tokenizer


def expected(dialogue: list[dict[str, str]] = DIALOGUE, template: str = BASE) -> list[int]:
    ids: Any = tokenizer_that_adds_a_token(BASE).apply_chat_template(
        dialogue, chat_template=template, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    return list(ids)


async def chat(rig: Rig, dialogue: list[dict[str, str]] = DIALOGUE, adapter: str = "") -> list[int]:
    """The prompt that the engine got."""
    await rig.generate(messages=messages(dialogue), adapter=adapter)
    submit = rig.engine.sent(Submit)[-1]
    assert isinstance(submit, Submit)
    return list(submit.prompt)


async def refusal(rig: Rig, adapter: str = "", dialogue: list[dict[str, str]] = DIALOGUE) -> Refusal:
    return await refused(rig.generate(messages=messages(dialogue), adapter=adapter))


@pytest.fixture
async def rig(make_rig: MakeRig) -> Rig:
    return await make_rig(tokenizer=tokenizer_that_adds_a_token(BASE))


async def test_dialogue_is_laid_out_by_the_bases_template(rig: Rig) -> None:
    assert await chat(rig) == expected()
    assert (await rig.inference.GetModel(inference_pb2.GetModelRequest())).has_chat_template


CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = """
{{- bos_token }}
{%- set date = strftime_now("%Y") %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{%- if tools is not none %}{{- "tools" }}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" + date + system_message + eos_token }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% else %}"
    "{% set loop_messages = messages %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)


@pytest.mark.parametrize("template", [CHATML, LLAMA, GEMMA], ids=["chatml", "llama", "gemma"])
@pytest.mark.parametrize("place", ["base", "adapter"])
async def test_templates_that_models_have_give_what_transformers_gives(
    make_rig: MakeRig, template: str, place: str
) -> None:
    rig = await make_rig(
        tokenizer=tokenizer_that_adds_a_token(template if place == "base" else None),
        facts=replace(FACTS, context_length=2048),
    )
    if place == "adapter":
        await rig.publish(ADAPTER, task={"chat_template": template})
    for dialogue in (DIALOGUE, DIALOGUE[1:]):
        prompt = await chat(rig, dialogue, ADAPTER if place == "adapter" else "")
        assert prompt == expected(dialogue, template)


async def test_special_token_that_template_and_tokenizer_both_add_comes_once(rig: Rig) -> None:
    prompt = await chat(rig, [{"role": "user", "content": "x"}])
    assert prompt.count(EOS) == 1
    await rig.generate(text="x")
    submit = rig.engine.sent(Submit)[-1]
    assert isinstance(submit, Submit)
    assert submit.prompt == (EOS, ord("x"))


async def test_adapters_own_template_goes_before_the_bases(rig: Rig) -> None:
    version = (await rig.publish(ADAPTER, task={"chat_template": OWN})).version
    assert version.has_chat_template
    assert expected(template=OWN) != expected()
    assert await chat(rig, adapter=ADAPTER) == expected(template=OWN)
    assert await chat(rig, adapter=ADAPTER) == expected(template=OWN)


async def test_adapter_without_a_template_takes_the_bases(rig: Rig) -> None:
    version = (await rig.publish(ADAPTER, task={"task": "chat"})).version
    assert not version.has_chat_template
    assert await chat(rig, adapter=ADAPTER) == expected()


async def test_adapters_template_works_on_a_base_without_one_and_after_a_restart(make_rig: MakeRig) -> None:
    first = await make_rig(tokenizer=tokenizer_that_adds_a_token(None))
    await first.publish(ADAPTER, task={"chat_template": OWN})
    await first.server.close()
    second = await make_rig(tokenizer=tokenizer_that_adds_a_token(None))
    assert await chat(second, adapter=ADAPTER) == expected(template=OWN)


async def test_another_template_is_another_version(rig: Rig) -> None:
    digests = [
        (await rig.publish(ADAPTER, task=task)).version.digest
        for task in ({}, {"chat_template": OWN}, {"chat_template": OWN + " "}, {"chat_template": None})
    ]
    assert len(set(digests)) == 3
    assert digests[0] == digests[3]


async def test_base_without_a_template_says_what_to_do(make_rig: MakeRig) -> None:
    rig = await make_rig()
    seen = await refusal(rig)
    assert (seen.code, seen.reason, list(seen.fields)) == ("FAILED_PRECONDITION", "NO_CHAT_TEMPLATE", ["messages"])
    assert "send text or token_ids" in seen.message
    assert not (await rig.inference.GetModel(inference_pb2.GetModelRequest())).has_chat_template


async def test_base_without_a_tokenizer_says_so(make_rig: MakeRig) -> None:
    assert (await refusal(await make_rig(tokenizer=None))).reason == "NO_TOKENIZER"


async def test_what_the_template_itself_refuses_is_told_in_its_words(rig: Rig) -> None:
    template = "{{ raise_exception('roles must alternate: user,\nthen assistant') }}"
    await rig.publish(ADAPTER, task={"chat_template": template})
    seen = await refusal(rig, ADAPTER)
    assert (seen.code, seen.reason, list(seen.fields)) == ("INVALID_ARGUMENT", "CHAT_TEMPLATE_REFUSED", ["messages"])
    assert seen.message.endswith(": roles must alternate: user, then assistant")


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].tool_calls[0].name }}",
        "{{ messages + 1 }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ messages[0 - 99999].content }}",
    ],
)
async def test_what_fails_inside_a_template_shows_no_internals(rig: Rig, template: str) -> None:
    await rig.publish(ADAPTER, task={"chat_template": template})
    seen = await refusal(rig, ADAPTER)
    assert (seen.code, seen.reason) == ("INVALID_ARGUMENT", "CHAT_TEMPLATE_REFUSED")
    assert seen.message == "messages: the chat template can not lay them out"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("fine\n{% for message in messages %}", "line 2"),
        ("{{ x | no_such_filter }}", "no_such_filter"),
        ("{{ 9 ** 9 ** 9 }}", "powers"),
        ("{{ 'x' * 99 }}", "multiplication"),
        ("{{ '%99d' % 1 }}", "formatting"),
        ("{{ 'x' | center(99) }}", "center"),
        ("{{ 'x'.ljust(99) }}", "ljust"),
        ("{{ 'x'['zfill'](99) }}", "zfill"),
        ("{{ range(1000000000) }}", "100000"),
        ("{% include 'other' %}", "no other templates"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "can not be compiled"),
        ("x" * 65_537, "at most 65536"),
        ("", "at least 1"),
    ],
)
async def test_template_that_no_server_should_run_is_refused_when_it_is_pushed(
    rig: Rig, template: str, problem: str
) -> None:
    seen = await refused(rig.publish(ADAPTER, task={"chat_template": template}))
    assert seen.code == "INVALID_ARGUMENT"
    assert "chat_template" in seen.message
    assert problem in seen.message
    assert (await refusal(rig, ADAPTER)).code == "NOT_FOUND"


async def test_runaway_template_is_ended_and_others_are_served(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chorus.services.chat.TEMPLATE_SECONDS", 1.0)
    rig = await make_rig(tokenizer=tokenizer_that_adds_a_token(BASE))
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    await rig.publish(ADAPTER, task={"chat_template": loops})
    began = time.monotonic()
    # More than there are threads for templates.
    for seen in await asyncio.gather(*(refusal(rig, ADAPTER) for _ in range(3))):
        assert (seen.code, seen.message) == (
            "INVALID_ARGUMENT",
            "messages: the chat template ran for over 1 s with them",
        )
    assert time.monotonic() - began < 15
    assert await chat(rig) == expected()


@pytest.mark.parametrize("content", ["x" * 600, "y" * 200_000])
async def test_dialogue_over_the_context_is_refused_with_the_limit(rig: Rig, content: str) -> None:
    seen = await refusal(rig, dialogue=[{"role": "user", "content": content}])
    assert (seen.code, seen.reason) == ("INVALID_ARGUMENT", "PROMPT_TOO_LONG")
    assert "512" in seen.message


async def test_template_that_writes_without_end_is_stopped_as_soon_as_it_is_too_long(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chorus.services.chat.TEMPLATE_SECONDS", 60.0)
    rig = await make_rig(tokenizer=tokenizer_that_adds_a_token(BASE))
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}"
    template = loops + "{{ messages[0].content }}" + "{% endfor %}" * 2
    await rig.publish(ADAPTER, task={"chat_template": template})
    began = time.monotonic()
    seen = await refusal(rig, ADAPTER)
    assert (seen.code, seen.reason) == ("INVALID_ARGUMENT", "PROMPT_TOO_LONG")
    assert time.monotonic() - began < 10  # some milliseconds here


async def test_template_that_changed_on_disk_is_data_loss(rig: Rig) -> None:
    version = (await rig.publish(ADAPTER, task={"chat_template": OWN})).version
    [stored] = rig.config.state_dir.glob(f"blobs/**/{version.digest}/task.json")
    card: dict[str, Any] = json.loads(stored.read_bytes())
    stored.chmod(0o644)
    stored.write_text(json.dumps(card | {"chat_template": OWN + "!"}))
    assert (await refusal(rig, ADAPTER)).code == "DATA_LOSS"
