"""What Prometheus scrapes: every series of the server, in a registry of its own.

Fed by the front end (stream lifecycles, step events) and the interceptor (errors). No tenant or adapter is ever a label
of a histogram; the one label with tenants' names is capped. Buckets are vLLM's, so that dashboards can be shared.
"""

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from chorus.engine.messages import Launch, StepEvents, StepStats

FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
INTER_TOKEN_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
STEP_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
COUNT_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
TIERS = ("device", "host")
LOAD_STAGES = ("resolve", "read", "validate", "host", "device")
MAX_TENANTS = 200
OTHER_TENANT = "other"
NO_TENANT = "none"


class Metrics:
    """All series; methods are called on the event loop only."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._tenants: set[str] = set()
        self._token_counters: dict[str, Counter] = {}
        self._request_histograms()
        self._request_counters()
        self._engine_gauges()
        self._engine_counters()
        self._build = self._info("chorus_build", "Versions of this server.")
        self._model = self._info("chorus_model", "The base model.")

    def describe(self, build: Mapping[str, str], model: Mapping[str, str]) -> None:
        """Fills `chorus_build_info` and `chorus_model_info`."""
        self._build.info(dict(build))
        self._model.info(dict(model))

    def request_arrived(self, tenant: str | None, prompt_tokens: int) -> None:
        self._prompt_tokens.inc(prompt_tokens)
        label = self._tenant_label(tenant)
        self._tenant_requests.labels(label).inc()
        self._token_counter(label).inc(prompt_tokens)

    def request_started(self, queue_s: float, cached_tokens: int) -> None:
        self._queue_time.observe(max(queue_s, 0.0))
        self._cached.inc(cached_tokens)

    def tokens_arrived(
        self, tenant: str | None, count: int, since_arrival_s: float | None, since_last_s: float | None
    ) -> None:
        """`since_arrival_s` is None but for a request's first tokens, `since_last_s` for an output's first ones."""
        self._generation_tokens.inc(count)
        known = tenant is None or tenant in self._tenants  # the last adapter may have gone while the stream runs
        self._token_counter(self._tenant_label(tenant) if known else OTHER_TENANT).inc(count)
        if since_arrival_s is not None:
            self._first_token.observe(since_arrival_s)
        if since_last_s is not None:
            self._inter_token.observe(since_last_s)

    def request_finished(self, reasons: Iterable[str], total_s: float) -> None:
        """One reason an output: a finish reason's value, or `error`."""
        for reason in reasons:
            self._finished.labels(reason).inc()
        self._total.observe(total_s)

    def error(self, code: str, reason: str) -> None:
        self._errors.labels(code, reason).inc()

    def adapter_loaded(self, seconds_by_stage: tuple[tuple[str, float], ...]) -> None:
        for stage, seconds in seconds_by_stage:
            self._load_seconds.labels(stage).observe(seconds)

    def step(self, events: StepEvents) -> None:
        """Takes in one turn of the engine."""
        stats = events.stats
        self._set_gauges(stats)
        self._preemptions.inc(stats.preemptions)
        self._page_evictions.inc(stats.page_evictions)
        self._evictions.labels("device").inc(stats.evictions)
        self._evictions.labels("host").inc(stats.host_evictions)
        self._hits.labels("device").inc(stats.adapter_hits)
        self._loads.labels("disk").inc(stats.loads_from_disk)
        self._loads.labels("host").inc(stats.loads_from_host)
        if events.ran:
            self._steps.inc()
            for how, count in stats.launches.items():
                self._launches.labels(how.value).inc(count)
            self._step_seconds.observe(stats.seconds)
            self._step_rows.observe(stats.rows)
            self._step_adapters.observe(stats.distinct_adapters)
            self._step_kinds.observe(stats.kinds)

    def _set_gauges(self, stats: StepStats) -> None:
        self._running.set(stats.running)
        self._waiting.set(stats.waiting)
        self._waiting_for_adapter.set(stats.waiting_for_adapter)
        self._graphs.set(stats.graphs)
        self._kv_usage.set(stats.kv_usage)
        self._kv_kept.set(stats.kv_kept)
        self._pool_usage.set(stats.pool_usage)
        self._resident.labels("device").set(stats.resident_device)
        self._resident.labels("host").set(stats.resident_host)
        self._pinned.set(stats.pinned)

    def _tenant_label(self, tenant: str | None) -> str:
        if tenant is None:
            return NO_TENANT
        if tenant not in self._tenants:
            if len(self._tenants) >= MAX_TENANTS:
                return OTHER_TENANT
            self._tenants.add(tenant)
        return tenant

    def _token_counter(self, label: str) -> Counter:
        """The tenant's counter, which prometheus_client takes longer to look up than to count up."""
        counter = self._token_counters.get(label)
        if counter is None:
            counter = self._token_counters[label] = self._tenant_tokens.labels(label)
        return counter

    def forget_tenant(self, tenant: str) -> None:
        """Removes the series of a tenant that has no adapter left."""
        if tenant in self._tenants:
            self._tenants.discard(tenant)
            self._tenant_requests.remove(tenant)
            self._tenant_tokens.remove(tenant)
            self._token_counters.pop(tenant, None)

    def _request_histograms(self) -> None:
        self._first_token = self._histogram(
            "chorus_time_to_first_token_seconds", "From arrival to the first token.", FIRST_TOKEN_BUCKETS
        )
        self._inter_token = self._histogram(
            "chorus_inter_token_latency_seconds", "Between two tokens of an output.", INTER_TOKEN_BUCKETS
        )
        self._total = self._histogram("chorus_e2e_request_latency_seconds", "From arrival to the end.", REQUEST_BUCKETS)
        self._queue_time = self._histogram(
            "chorus_request_queue_time_seconds", "From arrival to the first engine step.", REQUEST_BUCKETS
        )
        self._load_seconds = self._histogram(
            "chorus_adapter_load_seconds", "Loading an adapter version, by stage.", FIRST_TOKEN_BUCKETS, "stage"
        )
        for stage in LOAD_STAGES:
            self._load_seconds.labels(stage)

    def _request_counters(self) -> None:
        self._prompt_tokens = self._counter("chorus_prompt_tokens_total", "Prompt tokens taken in.")
        self._generation_tokens = self._counter("chorus_generation_tokens_total", "Tokens generated.")
        self._cached = self._counter("chorus_cached_prompt_tokens_total", "Prompt tokens found in the prefix cache.")
        self._finished = self._counter(
            "chorus_requests_finished_total", "Outputs, by how they ended; a request has n of them.", "reason"
        )
        for reason in ("stop", "length", "stop_string", "aborted", "error"):
            self._finished.labels(reason)
        self._errors = self._counter("chorus_errors_total", "Calls that ended with an error.", "code", "reason")
        self._tenant_tokens = self._counter("chorus_tenant_tokens_total", "Prompt and generated tokens.", "tenant")
        self._tenant_requests = self._counter("chorus_tenant_requests_total", "Requests.", "tenant")

    def _engine_gauges(self) -> None:
        self._running = self._gauge("chorus_requests_running", "Requests in the running batch.")
        self._waiting = self._gauge("chorus_requests_waiting", "Requests that wait.")
        self._waiting_for_adapter = self._gauge(
            "chorus_requests_waiting_for_adapter", "Requests that wait for their adapter to load."
        )
        self._graphs = self._gauge("chorus_graphs_held", "Recorded steps in memory.")
        self._kv_usage = self._gauge("chorus_kv_cache_usage_ratio", "Share of the KV blocks in use, 0 to 1.")
        self._kv_kept = self._gauge(
            "chorus_prefix_cache_kept_ratio", "Share of the KV blocks that nobody uses and that can be found, 0 to 1."
        )
        self._pool_usage = self._gauge("chorus_adapter_pool_usage_ratio", "Share of the rank rows in use, 0 to 1.")
        self._resident = self._gauge("chorus_adapters_resident", "Adapter versions in memory.", "tier")
        for tier in TIERS:
            self._resident.labels(tier)
        self._pinned = self._gauge("chorus_adapter_pinned", "Pinned adapter versions.")

    def _engine_counters(self) -> None:
        self._preemptions = self._counter(
            "chorus_preemptions_total", "Requests preempted for KV blocks or more important ones."
        )
        self._page_evictions = self._counter(
            "chorus_prefix_cache_evictions_total", "KV blocks that could be found and had to make room."
        )
        self._evictions = self._counter("chorus_adapter_evictions_total", "Versions evicted.", "tier")
        self._hits = self._counter("chorus_adapter_hits_total", "Requests that found their version.", "tier")
        self._hits.labels("device")
        for tier in TIERS:
            self._evictions.labels(tier)
        self._loads = self._counter("chorus_adapter_loads_total", "Versions that came to the device.", "source")
        for source in ("disk", "host"):
            self._loads.labels(source)
        self._steps = self._counter("chorus_engine_steps_total", "Forward passes.")
        self._launches = self._counter(
            "chorus_graph_steps_total",
            "Forward passes where steps are recorded, by how they were launched.",
            "how",
        )
        for how in Launch:
            self._launches.labels(how.value)
        self._step_seconds = self._histogram("chorus_step_seconds", "Length of an engine step.", STEP_BUCKETS)
        self._step_rows = self._histogram("chorus_step_rows", "Requests in a step.", COUNT_BUCKETS)
        self._step_adapters = self._histogram(
            "chorus_step_distinct_adapters", "Distinct adapter versions in a step.", COUNT_BUCKETS
        )
        self._step_kinds = self._histogram("chorus_step_kinds", "Distinct adapter kinds in a step.", COUNT_BUCKETS)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def _info(self, name: str, text: str) -> Info:
        return Info(name, text, registry=self.registry)
