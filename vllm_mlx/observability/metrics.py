"""Numbers for Prometheus, under vLLM's names and labels where the meaning is equal, so that its dashboards work here.

Each `Metrics` has a registry of its own: two servers in one process do not share counters. A leaf: it is told values
and a function that reads gauges, and imports nothing of the server. Used on the asyncio thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vllm_mlx.observability.histogram import QuickHistogram
from vllm_mlx.observability.journal import FinishedRequest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
_TOKENS = (1, 8, 32, 128, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


@dataclass(frozen=True, slots=True)
class Reading:
    """One value as of now. A name that ends in `_total` is a counter, any other a gauge."""

    name: str
    help: str
    value: float
    labels: dict[str, str] = field(default_factory=dict)


class _Gauges(Collector):
    """Values read when Prometheus asks."""

    def __init__(self, read: Callable[[], Iterable[Reading]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for reading in self._read():
            names = list(reading.labels)
            if (family := families.get(reading.name)) is None:
                is_counter = reading.name.endswith("_total")
                family = families[reading.name] = (
                    CounterMetricFamily(reading.name.removesuffix("_total"), reading.help, labels=names)
                    if is_counter
                    else GaugeMetricFamily(reading.name, reading.help, labels=names)
                )
            family.add_metric(list(reading.labels.values()), reading.value)  # type: ignore[attr-defined]
        yield from families.values()


class Metrics:
    """Counters and histograms of generations and HTTP answers."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def histogram(name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, help_text, ["model_name"], buckets=buckets, registry=self.registry)

        self.time_to_first_token = histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", _SECONDS)
        self.inter_token = QuickHistogram(
            "vllm:inter_token_latency_seconds", "Between two pieces of a streamed answer.", "model_name", _TOKEN_SECONDS
        )
        self.registry.register(self.inter_token)
        self.time_per_output_token = histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time per token after the first.", _TOKEN_SECONDS
        )
        self.latency = histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.", _SECONDS)
        self.queue_time = histogram("vllm:request_queue_time_seconds", "Waiting for a row or for memory.", _SECONDS)
        self.prefill_time = histogram("vllm:request_prefill_time_seconds", "Admitted to first token.", _SECONDS)
        self.decode_time = histogram("vllm:request_decode_time_seconds", "First to last token.", _SECONDS)
        self.prompt_size = histogram("vllm:request_prompt_tokens", "Prompt tokens a request.", _TOKENS)
        self.completion_size = histogram("vllm:request_generation_tokens", "Completion tokens a request.", _TOKENS)
        self.max_tokens = histogram("vllm:request_params_max_tokens", "Completion tokens a request may have.", _TOKENS)
        self.cached_size = histogram("vllm_mlx:request_cached_tokens", "Prompt tokens from the prefix cache.", _TOKENS)
        self.successes = Counter(
            "vllm:request_success",
            "Generations that ended, by finish reason.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self.reasoning_tokens = Counter(
            "vllm_mlx:reasoning_tokens", "Completion tokens that were reasoning.", ["model_name"],
            registry=self.registry,
        )  # fmt: skip
        self.failures = Counter(
            "vllm_mlx:request_unfinished",
            "Generations that ended without a final event (errors, clients that left).",
            ["route"],
            registry=self.registry,
        )
        self.beside_latency = Histogram(
            "vllm_mlx:beside_request_seconds",
            "Requests to the models beside the served one, arrival to answer, by task.",
            ["task"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.beside_tokens = Counter(
            "vllm_mlx:beside_tokens", "Tokens embedded and scored, by task.", ["task"], registry=self.registry
        )
        self.mcp_calls = Histogram(
            "vllm_mlx:mcp_call_seconds",
            "Calls of MCP tools, by server and outcome.",
            ["server", "outcome"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.truncated_inputs = Counter(
            "vllm_mlx:embedding_truncated", "Inputs of which only the beginning was embedded.", registry=self.registry
        )
        self.http_answers = Counter(
            "vllm_mlx:http_requests",
            "HTTP answers by route and status.",
            ["method", "route", "status"],
            registry=self.registry,
        )

    def add_gauges(self, read: Callable[[], Iterable[Reading]]) -> None:
        """`read` gives the values of now, at each scrape."""
        self.registry.register(_Gauges(read))

    def observe(self, request: FinishedRequest) -> None:
        """Count a finished generation."""
        if request.reason == "unfinished":
            self.failures.labels(route=request.facts.route).inc()
            return
        model = request.facts.model
        first_s = request.total_s if request.ttft_s is None else request.ttft_s
        self.time_to_first_token.labels(model).observe(first_s)
        self.latency.labels(model).observe(request.total_s)
        if (rate := request.tokens_per_second) is not None:
            self.time_per_output_token.labels(model).observe(1 / rate)
        for histogram, seconds in (
            (self.queue_time, request.queue_s),
            (self.prefill_time, request.prefill_s),
            (self.decode_time, request.decode_s),
            (self.max_tokens, request.max_tokens),
        ):
            if seconds is not None:
                histogram.labels(model).observe(seconds)
        self.prompt_size.labels(model).observe(request.num_prompt_tokens)
        self.completion_size.labels(model).observe(request.num_completion_tokens)
        self.cached_size.labels(model).observe(request.num_cached_tokens)
        self.reasoning_tokens.labels(model).inc(request.num_reasoning_tokens)
        self.successes.labels(model, request.reason).inc()

    def observe_mcp_call(self, server: str, outcome: str, seconds: float) -> None:
        self.mcp_calls.labels(server=server, outcome=outcome).observe(seconds)

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)
