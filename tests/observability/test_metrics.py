"""Claims about /metrics: Prometheus can read it, the Grafana file asks only for what is there, and all of it moves."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import promql_parser
import pytest
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client.parser import text_string_to_metric_families

import vllm_mlx
from tests.api.fakes import client_for, finished, make_context, says
from tools import grafana
from vllm_mlx.api import gauges
from vllm_mlx.api.context import ModelEntry
from vllm_mlx.engine.step import EngineStatus
from vllm_mlx.errors import Overloaded
from vllm_mlx.observability.histogram import QuickHistogram

DOCS = Path(__file__).parents[2] / "docs"
GRAFANA, DOCUMENTATION = DOCS / "grafana/vllm-mlx.json", DOCS / "metrics.md"
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


DISK = {"fault": None, "bytes": 1, "num_blocks": 2, "num_restored_tokens": 3, "written_bytes": 4, "num_damaged": 5,
        "num_swaps": 6}  # fmt: skip
EXTRA = {"num_draft_tokens": 8, "num_accepted_tokens": 5, "draft_seconds_saved": 0.5, "kv_held_bytes": 7,
         "disk_cache": DISK}  # fmt: skip


def defined() -> set[str]:
    """Every name of a metric that the package's source holds, as families are named: without `_total`."""
    trees = (ast.parse(path.read_text()) for path in Path(vllm_mlx.__file__).parent.rglob("*.py"))
    texts = (node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant))
    names = {text for text in texts if isinstance(text, str) and re.fullmatch(r"vllm(_mlx)?:\w+", text)}
    return {name.removesuffix("_total") for name in names}


async def scrape() -> str:
    """Metrics after two answers, one error, one refusal, some embedding, with every gauge above zero."""
    numbers = {
        name: 3
        for name, field in EngineStatus.__dataclass_fields__.items()
        if name.startswith(("num_", "kv_", "prefix_", "batch_")) and field.type == "int"
    }
    context = make_context(
        read_status=lambda: EngineStatus(**numbers, extra=EXTRA), read_memory=lambda: MEMORY,
        health_checks=lambda: CHECKS,
    )  # fmt: skip
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
        texts: list[str] = []

        def render() -> None:  # as a server of several models does
            context.models = SimpleNamespace(
                entries=lambda: [ModelEntry(context.model, (), "ready", False, 1, 0, 9, None)]
            )
            texts.append(context.metrics.render().decode())
            context.models = None

        service.script = lambda request: [render, *says("c")]
        await client.post("/v1/chat/completions", json=body)
    return texts[0]


def values(text: str) -> dict[str, dict[tuple[str, str], float]]:
    """The samples of each family, but for the times at which prometheus-client made them."""
    families = [f for f in text_string_to_metric_families(text) if not f.name.endswith("_created")]
    return {f.name: {(s.name, str(s.labels)): s.value for s in f.samples if not s.name.endswith("_created")}
            for f in families}  # fmt: skip


async def test_every_metric_moves():
    ill = make_context(read_status=lambda: EngineStatus(is_healthy=False))
    ill.metrics.add_gauges(lambda: gauges.read(ill))
    before, after = values(ill.metrics.render().decode()), values(await scrape())
    moved = {name for name, samples in after.items() if samples and samples != before.get(name)}
    assert defined() - moved == set()
    assert set(after) == defined()


async def test_the_documentation_lists_every_metric_and_no_other():
    row = re.compile(r"^\| (`[^|]+`) \|", re.MULTILINE)
    listed: set[str] = set()
    for cell in row.findall(DOCUMENTATION.read_text()):
        for name in re.findall(r"`([^`{]+)[^`]*`", cell):
            listed.add(name.removesuffix("_total"))
    assert listed == defined()


async def test_every_metric_has_help_and_a_prefix_that_says_whose_it_is():
    families = list(text_string_to_metric_families(await scrape()))
    assert all(f.documentation and f.name.startswith(("vllm:", "vllm_mlx:")) for f in families)
    unlabelled = [f.name for f in families if f.name.startswith("vllm:")
                  for sample in f.samples if "model_name" not in sample.labels]
    assert unlabelled == []  # vLLM's dashboards choose by this label


def test_grafana_s_own_types_take_the_dashboard_and_leave_nothing_of_it_out():
    plugins.register_default_plugins()
    file = json.loads(GRAFANA.read_text())
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(file)))
    assert list(lost(file, read)) == []
    assert file == grafana.dashboard(), "python -m tools.grafana writes it anew"
    ids = [panel["id"] for panel in file["panels"]]
    assert len(set(ids)) == len(ids) and file["uid"] and file["title"]


def lost(given: Any, read: Any, place: str = "") -> Iterator[str]:
    """What of the one is not, or not the same, in the other."""
    if isinstance(given, dict) and isinstance(read, dict):
        for name, value in given.items():
            yield from lost(value, read.get(name), f"{place}.{name}")
    elif isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        for i, value in enumerate(given):
            yield from lost(value, read[i], f"{place}[{i}]")
    elif given != read:
        yield place


async def test_the_dashboard_s_expressions_are_promql_and_ask_only_for_what_is_there():
    expressions = [t["expr"] for panel in json.loads(GRAFANA.read_text())["panels"] for t in panel.get("targets", [])]
    asked: set[str] = set()

    def note(expression: promql_parser.Expr) -> None:
        if isinstance(expression, promql_parser.VectorSelector):
            asked.add(expression.name)

    for expression in expressions:  # as Grafana fills them in
        filled = expression.replace("$__rate_interval", "1m").replace("$model", ".*")
        promql_parser.walk(promql_parser.parse(filled), note)
    given = {name for samples in values(await scrape()).values() for name, _ in samples}
    assert asked and asked <= given


@pytest.mark.parametrize(("value", "bucket"), [(0.5, "1.0"), (1.0, "1.0"), (1.5, "2.0"), (9.0, "+Inf")])
def test_a_quick_histogram_counts_like_prometheus_client_s(value, bucket):
    quick = QuickHistogram("q", "help", "model", (1, 2))
    quick.observe("m", value)
    [family] = quick.collect()
    counts = {s.labels["le"]: s.value for s in family.samples if s.name == "q_bucket"}
    edges = ["1.0", "2.0", "+Inf"]
    assert counts == {edge: float(edges.index(edge) >= edges.index(bucket)) for edge in edges}
    assert {s.name: s.value for s in family.samples}["q_sum"] == value
