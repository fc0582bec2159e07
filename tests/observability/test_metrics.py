"""Claims about /metrics: Prometheus can read it, the Grafana file asks only for what is there, and all of it moves."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.api.fakes import client_for, finished, make_context, says
from vllm_mlx.api import gauges
from vllm_mlx.engine.step import EngineStatus
from vllm_mlx.errors import Overloaded
from vllm_mlx.observability.histogram import QuickHistogram

GRAFANA = Path(__file__).parents[2] / "docs/grafana/vllm-mlx.json"
DIAGNOSTICS = {
    "timings_ms": {"queue": 5.0, "prefill": 20.0, "decode": 30.0},
    "cache": {"miss_reason": "token 7 is the first that differs"},
    "max_tokens": 64,
}
MEMORY = {
    "process_bytes": 9, "process_capacity_bytes": 10, "device_bytes": 3, "utilization_pct": 90.0,
    "pressure": "critical", "times_elevated": 1, "times_critical": 2, "rejects_new": True,
}  # fmt: skip
CHECKS = {
    "batch_divergence": {"metadata": {
        "agreement": 0.9, "sample_count": 4, "failed_probes": 1, "serialize_active": True}},
    "runtime_mode": {"metadata": {"row_limit": 4, "peak_concurrency": 3, "times_widened": 1}},
    "repetition": {"metadata": {"interventions": {"token loop": 2}}},
}  # fmt: skip


async def scrape() -> str:
    """Metrics after two answers, one error, one refusal, some embedding, with every gauge above zero."""
    numbers = {
        name: 3
        for name, field in EngineStatus.__dataclass_fields__.items()
        if name.startswith(("num_", "kv_", "prefix_", "batch_")) and field.type == "int"
    }
    context = make_context(
        read_status=lambda: EngineStatus(**numbers), read_memory=lambda: MEMORY, health_checks=lambda: CHECKS
    )
    context.metrics.add_gauges(lambda: gauges.read(context))
    service = context.service
    service.script = lambda request: says("a", "b", end=finished(diagnostics=DIAGNOSTICS))
    async with client_for(context) as client:
        body = {"messages": [{"role": "user", "content": "Hi"}]}
        await client.post("/v1/chat/completions", json=body)
        await client.post("/v1/chat/completions", json={**body, "stream": True})
        service.refusal = Overloaded("full", retry_after_s=1)
        await client.post("/v1/chat/completions", json=body)
        context.metrics.beside_latency.labels(task="embedding").observe(0.1)
        context.metrics.beside_tokens.labels(task="embedding").inc(7)
        context.metrics.truncated_inputs.inc()
        context.metrics.observe_mcp_call("files", "ok", 0.1)
        service.refusal = None
        service.script = lambda request: [lambda: texts.append(context.metrics.render().decode()), *says("c")]
        texts: list[str] = []
        await client.post("/v1/chat/completions", json=body)
    return texts[0]


async def test_every_metric_moves():
    families = list(text_string_to_metric_families(await scrape()))
    still = [f.name for f in families if not any(sample.value for sample in f.samples)]
    assert still == []
    empty = [f.name for f in families if not f.samples]
    assert empty == []


async def test_every_metric_has_help_and_a_prefix_that_says_whose_it_is():
    families = list(text_string_to_metric_families(await scrape()))
    assert all(f.documentation and f.name.startswith(("vllm:", "vllm_mlx:")) for f in families)
    unlabelled = [f.name for f in families if f.name.startswith("vllm:")
                  for sample in f.samples if "model_name" not in sample.labels]
    assert unlabelled == []  # vLLM's dashboards choose by this label


async def test_the_grafana_file_loads_and_asks_only_for_what_is_there():
    dashboard = json.loads(GRAFANA.read_text())
    assert dashboard["title"] and dashboard["uid"] and dashboard["schemaVersion"] >= 39
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    expressions = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", [])]
    asked = {name for e in expressions for name in re.findall(r"\bvllm(?:_mlx)?:\w+", e)}
    text = await scrape()
    given = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    assert asked and asked <= given
    assert all(expression.count("(") == expression.count(")") for expression in expressions)


@pytest.mark.parametrize(("value", "bucket"), [(0.5, "1.0"), (1.0, "1.0"), (1.5, "2.0"), (9.0, "+Inf")])
def test_a_quick_histogram_counts_like_prometheus_client_s(value, bucket):
    quick = QuickHistogram("q", "help", "model", (1, 2))
    quick.observe("m", value)
    [family] = quick.collect()
    counts = {s.labels["le"]: s.value for s in family.samples if s.name == "q_bucket"}
    edges = ["1.0", "2.0", "+Inf"]
    assert counts == {edge: float(edges.index(edge) >= edges.index(bucket)) for edge in edges}
    assert {s.name: s.value for s in family.samples}["q_sum"] == value
