"""Traces for OpenTelemetry: one span tree for each generation, made at its end from the times the journal has.

    chat MODEL                     the whole request, in the trace of its `traceparent` header if it sent one
    ├── prepare                    template, tokens, pictures, grammar
    ├── queue                      waiting for a row or for memory
    ├── prefill                    the prompt, as far as the cache did not have it
    └── decode                     first to last token

Needs the extra `otel`. Attributes follow OpenTelemetry's names for generative AI; no text of prompts or answers.
"""

from __future__ import annotations

from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from vllm_mlx.observability.journal import FAILED, FinishedRequest

STEPS = ("prepare", "queue", "prefill", "decode")


def exporter_to(endpoint: str) -> SpanExporter:
    """Sends spans to an OTLP collector over HTTP; `endpoint` is its root, such as http://localhost:4318."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # brings a client of its own

    return OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")


class Tracing:
    """An observer of the journal. Spans are exported by a thread of OpenTelemetry's, in batches."""

    def __init__(self, exporter: SpanExporter, version: str) -> None:
        resource = Resource.create({"service.name": "vllm-mlx", "service.version": version})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("vllm_mlx")
        self._propagator = TraceContextTextMapPropagator()

    def observe(self, request: FinishedRequest) -> None:
        """Make the request's spans."""
        facts = request.facts
        parent = self._propagator.extract({"traceparent": facts.traceparent}) if facts.traceparent else None
        end_s = request.ended
        root = self._tracer.start_span(
            f"{facts.route} {facts.model}",
            context=parent,
            kind=SpanKind.SERVER,
            start_time=_ns(end_s - request.total_s),
            attributes=_attributes(request),
        )
        if request.reason in FAILED:
            root.set_status(Status(StatusCode.ERROR, request.error))
        at_s = end_s - request.total_s
        context = set_span_in_context(root)
        for name in STEPS:
            seconds = getattr(request, f"{name}_s")
            if seconds is None:
                continue
            child = self._tracer.start_span(name, context=context, start_time=_ns(at_s))
            at_s = min(at_s + seconds, end_s)
            child.end(_ns(at_s))
        root.end(_ns(end_s))

    def close(self) -> None:
        """Export what is left. May block for the time of one export."""
        self._provider.shutdown()


def _attributes(request: FinishedRequest) -> dict[str, Any]:
    facts = request.facts
    known = {
        "gen_ai.operation.name": facts.route,
        "gen_ai.request.model": facts.model,
        "gen_ai.response.id": facts.id,
        "gen_ai.response.finish_reasons": (request.reason,),
        "gen_ai.usage.input_tokens": request.num_prompt_tokens,
        "gen_ai.usage.output_tokens": request.num_completion_tokens,
        "gen_ai.request.max_tokens": request.max_tokens,
        "gen_ai.server.time_to_first_token": request.ttft_s,
        "vllm_mlx.cached_tokens": request.num_cached_tokens,
        "vllm_mlx.reasoning_tokens": request.num_reasoning_tokens,
        "vllm_mlx.miss_reason": request.miss_reason,
        "vllm_mlx.request_id": facts.request_id,
        "vllm_mlx.session": facts.session or None,
        "vllm_mlx.stream": facts.is_stream,
    }
    return {name: value for name, value in known.items() if value is not None}


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
