"""Writes docs/grafana/vllm-mlx.json, the dashboard for Grafana: `python -m tools.grafana`.

The JSON is long and repeats itself; what differs between its panels is the table below.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "docs/grafana/vllm-mlx.json"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
MODEL = '{model_name=~"$model"}'


def rate(name: str) -> str:
    return f"sum(rate({name}{MODEL if name.startswith('vllm:') else ''}[$__rate_interval]))"


def quantiles(name: str) -> list[tuple[str, str]]:
    buckets = f"sum by (le) (rate({name}_bucket{MODEL}[$__rate_interval]))"
    return [(f"histogram_quantile({q}, {buckets})", f"p{round(100 * q)}") for q in (0.5, 0.9, 0.99)]


# Title, unit, [(expression, legend)]; a string begins a row.
PANELS: list[str | tuple[str, str, list[tuple[str, str]]]] = [
    "Throughput",
    ("Tokens", "short", [(rate("vllm:generation_tokens_total"), "generated/s"),
                         (rate("vllm:prompt_tokens_total"), "prompt/s")]),
    ("Requests", "short", [(f"sum(vllm:num_requests_running{MODEL})", "running"),
                           (f"sum(vllm:num_requests_waiting{MODEL})", "waiting"),
                           ("vllm_mlx:batch_rows", "rows of a step"), ("vllm_mlx:scheduler_row_limit", "row limit")]),
    ("Ended, by reason", "reqps", [(
        f"sum by (finished_reason) (rate(vllm:request_success_total{MODEL}[$__rate_interval]))",
        "{{finished_reason}}"), (rate("vllm_mlx:request_unfinished_total"), "unfinished")]),
    "Latency",
    ("Time to first token", "s", quantiles("vllm:time_to_first_token_seconds")),
    ("Between two tokens", "s", quantiles("vllm:inter_token_latency_seconds")),
    ("Arrival to last token", "s", quantiles("vllm:e2e_request_latency_seconds")),
    ("In the queue", "s", quantiles("vllm:request_queue_time_seconds")),
    ("Prefill", "s", quantiles("vllm:request_prefill_time_seconds")),
    ("HTTP answers that are errors", "reqps", [(
        'sum by (route, status) (rate(vllm_mlx:http_requests_total{status=~"[45].."}[$__rate_interval]))',
        "{{status}} {{route}}")]),
    "Cache and memory",
    ("Prompt tokens from the prefix cache", "percentunit", [(
        f"{rate('vllm:prefix_cache_hits_total')} / {rate('vllm:prefix_cache_queries_total')}", "share")]),
    ("Keys and values", "bytes", [("vllm_mlx:kv_bytes", "sequences"), ("vllm_mlx:kv_budget_bytes", "budget"),
                                  ("vllm_mlx:prefix_cache_bytes", "prefix cache"),
                                  ("vllm_mlx:prefix_cache_budget_bytes", "its budget")]),
    ("Memory", "bytes", [("vllm_mlx:memory_process_bytes", "process"), ("vllm_mlx:memory_capacity_bytes", "capacity"),
                         ("vllm_mlx:memory_device_bytes", "device")]),
    ("Memory guard", "short", [("vllm_mlx:memory_pressure", "pressure (2 is the limit)"),
                               ("vllm_mlx:memory_rejects_new", "refuses new requests")]),
    ("Preemptions, evictions", "short", [(rate("vllm:num_preemptions_total"), "preempted/s"),
                                         (rate("vllm_mlx:prefix_cache_evictions_total"), "evicted/s")]),
    ("Guesses that were right", "percentunit", [(
        f"{rate('vllm:spec_decode_num_accepted_tokens_total')} / {rate('vllm:spec_decode_num_draft_tokens_total')}",
        "share")]),
    ("Disk cache", "short", [(rate("vllm_mlx:disk_cache_restored_tokens_total"), "tokens read/s"),
                             (rate("vllm_mlx:disk_cache_swaps_total"), "sequences written/s")]),
    ("Agreement of batched answers", "percentunit", [("vllm_mlx:divergence_agreement", "agreement")]),
]  # fmt: skip


def panel(number: int, title: str, unit: str, targets: list[tuple[str, str]], column: int, y: int) -> dict[str, Any]:
    return {
        "id": number,
        "type": "timeseries",
        "title": title,
        "datasource": SOURCE,
        "gridPos": {"x": 8 * column, "y": y, "w": 8, "h": 8},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0, "custom": {"fillOpacity": 8, "showPoints": "never"}},
                        "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [{"refId": chr(65 + i), "datasource": SOURCE, "expr": expression, "legendFormat": legend}
                    for i, (expression, legend) in enumerate(targets)],
    }  # fmt: skip


def dashboard() -> dict[str, Any]:
    panels: list[dict[str, Any]] = []
    column = y = 0
    for number, item in enumerate(PANELS, 1):
        if isinstance(item, str):
            y += 8 if column else 0
            column = 0
            panels.append({"id": number, "type": "row", "title": item, "collapsed": False, "panels": [],
                           "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}})  # fmt: skip
            y += 1
            continue
        panels.append(panel(number, *item, column, y))
        column = (column + 1) % 3
        y += 0 if column else 8
    variables = [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"},
        {"name": "model", "type": "query", "label": "Model", "datasource": SOURCE, "includeAll": True, "multi": True,
         "allValue": ".*", "current": {"text": "All", "value": "$__all"}, "refresh": 2,
         "query": "label_values(vllm:num_requests_running, model_name)"},
    ]  # fmt: skip
    return {
        "title": "vllm-mlx", "uid": "vllm-mlx", "tags": ["vllm-mlx"], "schemaVersion": 39, "version": 1,
        "editable": True, "refresh": "10s", "time": {"from": "now-1h", "to": "now"}, "timezone": "browser",
        "templating": {"list": variables}, "panels": panels,
    }  # fmt: skip


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(dashboard(), indent=1) + "\n")
