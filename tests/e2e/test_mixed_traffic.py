"""Tenants' adapters are pushed by the command line while a stream runs, then all answer at once, each as if alone."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from chorus.client import Client, Completion
from support.claims import assert_solo_greedy, until
from support.scrape import Scrape
from support.server import ServerProcess, run_command
from support.tiny import VOCAB
from support.worlds import PROMPT, TinyWorld

GREEDY: dict[str, Any] = {"max_tokens": 40, "temperature": 0, "ignore_eos": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "four": {"r": 4},
    "sixteen": {"r": 16, "lora_alpha": 48, "use_rslora": True},
    "attention": {"r": 6, "target_modules": ["q_proj", "v_proj"]},
    "patterns": {"r": 8, "rank_pattern": {"q_proj": 11}, "alpha_pattern": {"down_proj": 20}},
}
EACH = 3
# What api.md promises; a row of its table that can not apply is named in the test below.
METRICS = {
    *(f"chorus_{name}_seconds_count" for name in ("time_to_first_token", "inter_token_latency")),
    *(f"chorus_{name}_seconds_count" for name in ("e2e_request_latency", "request_queue_time", "adapter_load", "step")),
    *(f"chorus_requests_{state}" for state in ("running", "waiting", "waiting_for_adapter")),
    *("chorus_kv_cache_usage_ratio", "chorus_adapter_pool_usage_ratio", "chorus_adapters_resident"),
    *("chorus_adapter_pinned", "chorus_preemptions_total", "chorus_requests_finished_total"),
    *(f"chorus_{kind}_tokens_total" for kind in ("prompt", "generation", "cached_prompt", "tenant")),
    *("chorus_adapter_evictions_total", "chorus_adapter_hits_total", "chorus_engine_steps_total"),
    *("chorus_step_rows_count", "chorus_step_distinct_adapters_count", "chorus_step_kinds_count"),
    *("chorus_tenant_requests_total", "chorus_errors_total", "chorus_build_info", "chorus_model_info"),
}


@dataclass
class Traffic:
    """What came of it: one row per call, and the metrics before, between stream and mixture, and after."""

    pushed: dict[str, dict[str, Any]]
    during: list[tuple[list[int], Completion]]
    calls: list[tuple[str, list[int], Completion]]
    before: Scrape
    between: Scrape
    after: Scrape

    def grew(self, name: str, **labels: str) -> float:
        return self.after.value(name, **labels) - self.before.value(name, **labels)

    @property
    def completions(self) -> list[Completion]:
        return [completion for _, completion in self.during] + [completion for _, _, completion in self.calls]


def prompt(number: int) -> list[int]:
    """Prompts of different lengths and tokens."""
    return [3 + (7 * number + 5 * i + i * i) % (VOCAB - 3) for i in range(4 + 9 * (number % 5))]


def keep_streaming(client: Client, stop: Event) -> Iterator[tuple[list[int], Completion]]:
    """Base-model streams, one after the other, until told to stop."""
    for number in count():
        yield prompt(number), client.generate(prompt(number), **GREEDY)
        if stop.is_set():
            return


@pytest.fixture(scope="module")
def traffic(tiny: ServerProcess, client: Client, world: TinyWorld) -> Traffic:
    folders: dict[str, Path] = {name: world.adapter(name, **config) for name, config in CONFIGS.items()}
    before = tiny.scrape()

    def push(name: str) -> dict[str, Any]:
        options = ("--tenant", f"mixed-{name}", "--name", name, "--admin", tiny.admin, "--json")
        done = run_command("adapters", "push", str(folders[name]), *options)
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    stop = Event()
    with ThreadPoolExecutor(len(CONFIGS) + 1) as threads:
        streaming = threads.submit(lambda: list(keep_streaming(client, stop)))
        until(lambda: tiny.scrape().value("chorus_requests_running") > 0, "the stream runs")
        pushed = dict(zip(CONFIGS, threads.map(push, CONFIGS), strict=True))
        stop.set()
        during = streaming.result(60)
    until(lambda: tiny.scrape().value("chorus_requests_running") == 0, "the stream's last step is counted")
    between = tiny.scrape()

    names = [name for _ in range(EACH) for name in ("", *CONFIGS)]
    prompts = [prompt(number) for number in range(len(names))]

    def ask(name: str, ids: list[int]) -> Completion:
        return client.generate(ids, adapter=name and f"mixed-{name}/{name}", **GREEDY)

    with ThreadPoolExecutor(len(names)) as threads:
        answers = list(threads.map(ask, names, prompts))
    until(lambda: tiny.scrape().value("chorus_requests_running") == 0, "the last step is counted")
    return Traffic(pushed, during, list(zip(names, prompts, answers, strict=True)), before, between, tiny.scrape())


def test_push_says_what_it_stored(traffic: Traffic) -> None:
    for name, answer in traffic.pushed.items():
        assert answer["name"] == f"tenants/mixed-{name}/adapters/{name}"
        assert answer["version"] == f"{answer['name']}/versions/{answer['digest']}"
        assert answer["aliases"] == {"live": answer["digest"]}
        assert answer["created"] is True
        assert answer["kind"] == "LORA"
    assert [answer["max_rank"] for answer in traffic.pushed.values()] == [4, 16, 6, 11]


def test_stream_during_the_pushes_is_what_the_base_says_alone(traffic: Traffic, world: TinyWorld) -> None:
    for ids, completion in traffic.during:
        assert_solo_greedy(world.base, None, ids, completion.token_ids)


def test_every_answer_of_the_mixture_is_the_adapters_alone(traffic: Traffic, world: TinyWorld) -> None:
    for name, ids, completion in traffic.calls:
        folder = world.adapter(name, **CONFIGS[name]) if name else None
        assert_solo_greedy(world.base, folder, ids, completion.token_ids)
        assert completion.version == (traffic.pushed[name]["version"] if name else "")
        assert len(completion.token_ids) == GREEDY["max_tokens"]


def test_adapters_of_the_mixture_differ(world: TinyWorld, client: Client, traffic: Traffic) -> None:
    names = ["", *(f"mixed-{name}/{name}" for name in CONFIGS)]
    answers = {client.generate(PROMPT, adapter=name, **GREEDY).token_ids for name in names}
    assert len(answers) == len(names)


def test_one_step_served_several_adapters(traffic: Traffic) -> None:
    name = "chorus_step_distinct_adapters"
    assert traffic.after.above(name, 1) - traffic.before.above(name, 1) > 0
    # Fewer steps than if every request of the mixture had had the machine for itself.
    alone = sum(completion.usage.completion_tokens for _, _, completion in traffic.calls)
    steps = "chorus_engine_steps_total"
    assert traffic.after.value(steps) - traffic.between.value(steps) < alone / 2


def test_counters_add_up_to_what_the_callers_got(traffic: Traffic) -> None:
    completions = traffic.completions
    prompts = sum(completion.usage.prompt_tokens for completion in completions)
    generated = sum(len(completion.token_ids) for completion in completions)
    assert traffic.grew("chorus_prompt_tokens_total") == prompts
    assert traffic.grew("chorus_generation_tokens_total") == generated
    assert traffic.grew("chorus_requests_finished_total", reason="length") == len(completions)
    for histogram in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
        assert traffic.grew(f"chorus_{histogram}_seconds_count") == len(completions), histogram
    for name in CONFIGS:
        own = [completion for called, _, completion in traffic.calls if called == name]
        tokens = sum(each.usage.prompt_tokens + each.usage.completion_tokens for each in own)
        assert traffic.grew("chorus_tenant_tokens_total", tenant=f"mixed-{name}") == tokens
        assert traffic.grew("chorus_tenant_requests_total", tenant=f"mixed-{name}") == EACH
    hits = sum(called != "" and each.timing.adapter_load == 0 for called, _, each in traffic.calls)
    assert traffic.grew("chorus_adapter_hits_total", tier="device") == hits
    for stage in ("host", "device"):
        assert traffic.grew("chorus_adapter_load_seconds_count", stage=stage) == len(CONFIGS), stage


def test_every_promised_metric_is_there(tiny: ServerProcess, traffic: Traffic) -> None:
    with pytest.raises(Exception, match="no such adapter"), tiny.client() as client:
        client.generate(PROMPT, adapter="nobody/nothing")
    assert tiny.scrape().names >= METRICS
