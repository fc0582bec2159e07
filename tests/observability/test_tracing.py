"""Claims about traces: one tree a generation, in its caller's trace, with times that lie inside each other."""

from __future__ import annotations

import pytest

from tests.api.fakes import chat_body, client_for, finished, make_context, says
from vllm_mlx import app
from vllm_mlx.errors import SettingsError
from vllm_mlx.settings import ServerSettings

sdk = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter", reason="the extra otel is absent")

DIAGNOSTICS = {"timings_ms": {"prepare": 1.0, "queue": 2.0, "prefill": 3.0, "decode": 4.0}, "max_tokens": 9}
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def spans_of(*events, **headers):
    from vllm_mlx.observability.tracing import Tracing

    exporter = sdk.InMemorySpanExporter()
    tracing = Tracing(exporter, "1")
    context = make_context()
    context.service.script = lambda request: list(events)
    context.journal.observers.append(tracing.observe)
    async with client_for(context) as client:
        await client.post("/v1/chat/completions", json=chat_body(), headers=headers)
    tracing._provider.force_flush()
    spans = exporter.get_finished_spans()
    tracing.close()
    return {span.name.split(" ")[0]: span for span in spans}


async def test_a_generation_is_one_tree_of_spans():
    spans = await spans_of(*says("a", end=finished(diagnostics=DIAGNOSTICS)))
    assert list(spans) == ["prepare", "queue", "prefill", "decode", "chat"]
    root = spans["chat"]
    assert {span.parent.span_id for name, span in spans.items() if name != "chat"} == {root.context.span_id}
    assert root.start_time <= spans["prepare"].start_time <= spans["decode"].end_time <= root.end_time
    assert spans["queue"].start_time == spans["prepare"].end_time
    assert root.attributes["gen_ai.usage.input_tokens"] == 11 and root.attributes["vllm_mlx.cached_tokens"] == 4
    assert root.attributes["gen_ai.request.model"] == "test/model"


async def test_a_trace_goes_on_from_the_caller_s():
    root = (await spans_of(*says("a"), traceparent=PARENT))["chat"]
    assert f"{root.context.trace_id:032x}" == PARENT[3:35] and f"{root.parent.span_id:016x}" == PARENT[36:52]


async def test_a_wrong_traceparent_begins_a_trace_of_its_own():
    assert (await spans_of(*says("a"), traceparent="nonsense"))["chat"].parent is None


async def test_a_failed_generation_is_an_error_span():
    root = (await spans_of(*says("a", end=finished("error", error="It tripped."))))["chat"]
    assert not root.status.is_ok and root.status.description == "It tripped."


def test_without_the_extra_the_flag_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vllm_mlx.observability.tracing", None)
    with pytest.raises(SettingsError, match="extra `otel`"):
        app.start_tracing(ServerSettings(otlp_endpoint="http://localhost:4318"), make_context())


def test_without_the_flag_there_is_no_tracing():
    assert app.start_tracing(ServerSettings(), make_context()) is None


def test_the_flag_adds_an_observer():
    context = make_context()
    tracing = app.start_tracing(ServerSettings(otlp_endpoint="http://127.0.0.1:9"), context)
    assert len(context.journal.observers) == 2
    tracing.close()
