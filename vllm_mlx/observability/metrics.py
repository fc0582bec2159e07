"""Numbers for Prometheus, under vLLM's names where the meaning is equal, so that its dashboards work here.

Each `Metrics` has a registry of its own: two servers in one process do not share counters. A leaf: it is told values
and a function that reads gauges, and imports nothing of the server. Used on the asyncio thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
_TOKENS = (1, 8, 32, 128, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


class FinishedUsage(Protocol):
    """What is counted of a finished generation."""

    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def num_completion_tokens(self) -> int: ...
    @property
    def num_cached_tokens(self) -> int: ...


class _Gauges(Collector):
    """Values read when Prometheus asks; names ending in `_total` become counters."""

    def __init__(self, read: Callable[[], Mapping[str, tuple[str, float]]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        for name, (help_text, value) in self._read().items():
            if name.endswith("_total"):
                yield CounterMetricFamily(name.removesuffix("_total"), help_text, value=value)
            else:
                yield GaugeMetricFamily(name, help_text, value=value)


class Metrics:
    """Counters and histograms of generations and HTTP answers."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def histogram(name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, help_text, buckets=buckets, registry=self.registry)

        self.time_to_first_token = histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", _SECONDS)
        self.time_per_output_token = histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time per token after the first.", _TOKEN_SECONDS
        )
        self.latency = histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.", _SECONDS)
        self.prompt_size = histogram("vllm:request_prompt_tokens", "Prompt tokens a request.", _TOKENS)
        self.completion_size = histogram("vllm:request_generation_tokens", "Completion tokens a request.", _TOKENS)
        self.successes = Counter(
            "vllm:request_success",
            "Generations that ended, by finish reason.",
            ["finished_reason"],
            registry=self.registry,
        )
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
        self.truncated_inputs = Counter(
            "vllm_mlx:embedding_truncated", "Inputs of which only the beginning was embedded.", registry=self.registry
        )
        self.http_answers = Counter(
            "vllm_mlx:http_requests",
            "HTTP answers by route and status.",
            ["method", "route", "status"],
            registry=self.registry,
        )

    def add_gauges(self, read: Callable[[], Mapping[str, tuple[str, float]]]) -> None:
        """`read` gives name → (help, value), at each scrape."""
        self.registry.register(_Gauges(read))

    def start_request(self, route: str) -> RequestTimer:
        return RequestTimer(self, route)

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)


class RequestTimer:
    """Times one generation from its arrival. Told of its first output, its end, or (by `close`) that none came."""

    __slots__ = ("_first", "_is_done", "_metrics", "_route", "_started")

    def __init__(self, metrics: Metrics, route: str) -> None:
        self._metrics = metrics
        self._route = route
        self._started = time.monotonic()
        self._first: float | None = None
        self._is_done = False

    @property
    def has_first(self) -> bool:
        return self._first is not None

    def first_output(self) -> None:
        if self._first is None:
            self._first = time.monotonic()

    def finished(self, reason: str, usage: FinishedUsage) -> None:
        metrics, now = self._metrics, time.monotonic()
        self._is_done = True
        first = self._first if self._first is not None else now
        metrics.time_to_first_token.observe(first - self._started)
        metrics.latency.observe(now - self._started)
        if usage.num_completion_tokens > 1:
            metrics.time_per_output_token.observe((now - first) / (usage.num_completion_tokens - 1))
        metrics.prompt_size.observe(usage.num_prompt_tokens)
        metrics.completion_size.observe(usage.num_completion_tokens)
        metrics.successes.labels(finished_reason=reason).inc()

    def close(self) -> None:
        """The generation is over; without a final event it counts as unfinished."""
        if not self._is_done:
            self._is_done = True
            self._metrics.failures.labels(route=self._route).inc()
