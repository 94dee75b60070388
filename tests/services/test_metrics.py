"""What Prometheus scrapes, read back with its own parser."""

import urllib.request
from asyncio import to_thread

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from chorus.admin.v1 import adapters_pb2
from chorus.engine.messages import Launch, StepEvents, StepStats
from chorus.metrics import MAX_TENANTS, Metrics
from chorus.v1 import generate_pb2
from services.fakes import never_ends, says
from services.harness import Rig, refused, until

# Straight to the loopback address, whatever proxy the environment names.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]

TABLE = """
chorus_time_to_first_token_seconds chorus_inter_token_latency_seconds chorus_e2e_request_latency_seconds
chorus_request_queue_time_seconds chorus_adapter_load_seconds chorus_requests_running chorus_requests_waiting
chorus_requests_waiting_for_adapter chorus_kv_cache_usage_ratio chorus_adapter_pool_usage_ratio
chorus_adapters_resident chorus_adapter_pinned chorus_prompt_tokens chorus_generation_tokens
chorus_cached_prompt_tokens chorus_requests_finished chorus_errors chorus_preemptions chorus_adapter_evictions
chorus_adapter_hits chorus_engine_steps chorus_step_seconds chorus_step_rows chorus_step_distinct_adapters
chorus_prefix_cache_kept_ratio chorus_prefix_cache_evictions
chorus_graph_steps chorus_graphs_held
chorus_step_kinds chorus_tenant_tokens chorus_tenant_requests chorus_build_info chorus_model_info
"""


async def scrape(rig: Rig) -> Samples:
    url = f"http://127.0.0.1:{rig.endpoints.metrics_port}/metrics"

    def get() -> str:
        with OPENER.open(url, timeout=5) as response:
            return str(response.read().decode())

    return parse(await to_thread(get))


def parse(text: str) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_every_metric_of_the_table_is_there(rig: Rig) -> None:
    families = {f.name for f in text_string_to_metric_families(generate_latest(rig.server.metrics.registry).decode())}
    assert set(TABLE.split()) <= families


async def test_a_request_is_counted_once_in_every_series(rig: Rig) -> None:
    await rig.publish("tenants/a/adapters/x")
    rig.engine.reply = says("hello")
    await rig.generate(text="abc", adapter="tenants/a/adapters/x")
    await rig.generate(text="de")
    samples = await scrape(rig)
    assert samples["chorus_prompt_tokens_total", ()] == 5
    assert samples["chorus_generation_tokens_total", ()] == 12
    assert samples["chorus_requests_finished_total", (("reason", "stop"),)] == 2
    assert samples["chorus_time_to_first_token_seconds_count", ()] == 2
    assert samples["chorus_inter_token_latency_seconds_count", ()] == 10
    assert samples["chorus_e2e_request_latency_seconds_count", ()] == 2
    assert samples["chorus_request_queue_time_seconds_count", ()] == 2
    assert samples["chorus_tenant_requests_total", (("tenant", "a"),)] == 1
    assert samples["chorus_tenant_tokens_total", (("tenant", "a"),)] == 9
    assert samples["chorus_tenant_requests_total", (("tenant", "none"),)] == 1


async def test_ends_are_counted_by_their_reason(rig: Rig) -> None:
    rig.engine.reply = says("a STOP b")
    await rig.generate(sampling=generate_pb2.SamplingParams(stop=["STOP"]))
    rig.engine.reply = never_ends
    call = rig.inference.Generate(generate_pb2.GenerateRequest(text="x"))
    await anext(aiter(call))
    call.cancel()
    # Counted once the server has heard of the cancelling. An Abort says nothing: the stop string may have sent one.
    count = rig.server.metrics.registry.get_sample_value
    await until(lambda: count("chorus_requests_finished_total", {"reason": "aborted"}) == 1)
    samples = await scrape(rig)
    assert samples["chorus_requests_finished_total", (("reason", "stop_string"),)] == 1
    assert samples["chorus_requests_finished_total", (("reason", "aborted"),)] == 1


async def test_errors_are_counted_by_code_and_reason(rig: Rig) -> None:
    await refused(rig.generate(adapter="tenants/a/adapters/none"))
    key = ("chorus_errors_total", (("code", "NOT_FOUND"), ("reason", "ADAPTER_NOT_FOUND")))
    assert (await scrape(rig))[key] == 1


async def test_build_and_model_are_told(rig: Rig) -> None:
    samples = await scrape(rig)
    [model] = [dict(labels) for name, labels in samples if name == "chorus_model_info"]
    assert model == {"name": "tiny", "digest": "0" * 64, "model_type": "llama", "dtype": "float32"}
    [build] = [dict(labels) for name, labels in samples if name == "chorus_build_info"]
    assert {"version", "python", "torch", "transformers"} <= build.keys()


async def test_series_of_a_tenant_go_with_its_last_adapter(rig: Rig) -> None:
    key = ("chorus_tenant_requests_total", (("tenant", "a"),))
    for name in ("tenants/a/adapters/x", "tenants/a/adapters/y"):
        await rig.publish(name)
        await rig.generate(adapter=name)
    await rig.admin.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name="tenants/a/adapters/x"))
    assert key in await scrape(rig)
    await rig.admin.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name="tenants/a/adapters/y"))
    assert key not in await scrape(rig)


def test_steps_set_gauges_and_only_those_that_ran_are_counted() -> None:
    metrics = Metrics()
    stats = StepStats(seconds=0.02, rows=3, distinct_adapters=2, kinds=1, running=3, waiting=4, preemptions=1)
    metrics.step(StepEvents(stats=stats, ran=True))
    metrics.step(
        StepEvents(
            stats=StepStats(running=1, kv_usage=0.5, kv_kept=0.25, resident_device=2, page_evictions=3), ran=False
        )
    )
    samples = parse(generate_latest(metrics.registry).decode())
    assert samples["chorus_engine_steps_total", ()] == 1
    assert samples["chorus_step_rows_sum", ()] == 3
    assert samples["chorus_requests_running", ()] == 1
    assert samples["chorus_kv_cache_usage_ratio", ()] == 0.5
    assert samples["chorus_prefix_cache_kept_ratio", ()] == 0.25
    assert samples["chorus_prefix_cache_evictions_total", ()] == 3
    assert samples["chorus_adapters_resident", (("tier", "device"),)] == 2
    assert samples["chorus_preemptions_total", ()] == 1


def test_adapters_that_come_and_go_are_counted_by_where_from() -> None:
    metrics = Metrics()
    stats = StepStats(evictions=1, host_evictions=2, adapter_hits=3, loads_from_disk=4, loads_from_host=5)
    metrics.step(StepEvents(stats=stats, ran=False))
    samples = parse(generate_latest(metrics.registry).decode())
    assert samples["chorus_adapter_evictions_total", (("tier", "device"),)] == 1
    assert samples["chorus_adapter_evictions_total", (("tier", "host"),)] == 2
    assert samples["chorus_adapter_hits_total", (("tier", "device"),)] == 3
    assert samples["chorus_adapter_loads_total", (("source", "disk"),)] == 4
    assert samples["chorus_adapter_loads_total", (("source", "host"),)] == 5


def test_passes_are_counted_by_how_they_were_launched() -> None:
    metrics = Metrics()
    metrics.step(StepEvents(stats=StepStats(launches={Launch.RECORDED: 1}, graphs=1), ran=True))
    metrics.step(StepEvents(stats=StepStats(launches={Launch.GRAPH: 1, Launch.FAILED: 2}, graphs=1), ran=True))
    samples = parse(generate_latest(metrics.registry).decode())
    passes = {
        dict(labels)["how"]: value for (name, labels), value in samples.items() if name == "chorus_graph_steps_total"
    }
    assert passes == {"graph": 1, "recorded": 1, "rare": 0, "prompt": 0, "adapter": 0, "failed": 2}
    assert samples["chorus_graphs_held", ()] == 1


def test_ten_thousand_tenants_keep_the_page_small() -> None:
    metrics = Metrics()
    for i in range(10_000):
        metrics.request_arrived(f"tenant-{i}", 1)
    page = generate_latest(metrics.registry)
    samples = parse(page.decode())
    assert len(page) < 2**20
    tenants = {labels for name, labels in samples if name == "chorus_tenant_requests_total"}
    assert len(tenants) == MAX_TENANTS + 1
    assert samples["chorus_tenant_requests_total", (("tenant", "other"),)] == 10_000 - MAX_TENANTS


def test_an_idle_server_has_its_series_at_zero() -> None:
    samples = parse(generate_latest(Metrics().registry).decode())
    for tier in ("device", "host"):
        assert samples["chorus_adapters_resident", (("tier", tier),)] == 0
        assert samples["chorus_adapter_evictions_total", (("tier", tier),)] == 0
    for source in ("disk", "host"):
        assert samples["chorus_adapter_loads_total", (("source", source),)] == 0
    assert samples["chorus_adapter_hits_total", (("tier", "device"),)] == 0


def test_late_tokens_of_a_tenant_that_is_gone_count_as_others() -> None:
    metrics = Metrics()
    metrics.request_arrived("tenant-1", 1)
    metrics.forget_tenant("tenant-1")
    metrics.tokens_arrived("tenant-1", 3, 0.1, None)
    samples = parse(generate_latest(metrics.registry).decode())
    tokens = {labels: value for (name, labels), value in samples.items() if name == "chorus_tenant_tokens_total"}
    assert tokens == {(("tenant", "other"),): 3}


@pytest.mark.parametrize("gone", ["tenant-1", "tenant-unknown"])
def test_series_of_a_tenant_that_is_gone_are_removed(gone: str) -> None:
    metrics = Metrics()
    metrics.request_arrived("tenant-1", 1)
    metrics.forget_tenant(gone)
    samples = parse(generate_latest(metrics.registry).decode())
    assert (("chorus_tenant_requests_total", (("tenant", gone),)) in samples) is False
