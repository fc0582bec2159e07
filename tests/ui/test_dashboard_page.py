"""What the dashboard shows of a server in trouble, which the built-in model is not: a scripted one is."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import httpx
import pytest

from tests.api.fakes import chat_body, until
from tests.ui.acts import expect
from vllm_mlx.engine.step import EngineStatus, Progress

pytestmark = pytest.mark.asyncio(loop_scope="session")

MEMORY = {
    "backend": "cpu", "pressure": "elevated", "utilization_pct": 74.2, "trend": "rising", "action": "reject-new",
    "process_bytes": 3 << 30, "process_capacity_bytes": 4 << 30, "warn_threshold_pct": 70, "limit_threshold_pct": 85,
    "times_elevated": 2, "times_critical": 0, "weights_gb": 1.5, "active_gb": 2.0, "peak_gb": 2.5,
}  # fmt: skip
CHECKS = {"memory": {"status": "warning", "detail": "memory is 74 % full", "metadata": {"trend": "rising"}}}
STATUS = EngineStatus(
    batch_rows=1, num_running=1, kv_bytes=50 << 20, kv_budget_bytes=100 << 20,
    num_prefix_hits=3, num_prefix_misses=1, num_cached_tokens=30, num_prompt_tokens=60,
)  # fmt: skip


@pytest.mark.parametrize("site", [{"read_memory": lambda: MEMORY, "health_checks": lambda: CHECKS}], indirect=True)
async def test_phases_pressure_caches_and_where_reuse_ended_are_said(site):
    progress: list[Progress] = []
    site.context.read_status = lambda: replace(STATUS, requests=tuple(progress))
    site.context.journal.miss_reasons["token N is the first that differs"] += 2
    site.model.gate.clear()
    page = await site.open("/dashboard")
    async with httpx.AsyncClient(timeout=60) as client:
        asked = [asyncio.create_task(client.post(f"{site.address}/v1/chat/completions", json=chat_body()))
                 for _ in range(3)]  # fmt: skip
        await until(lambda: len(site.model.running) == 3)
        decoding, reading, waiting = (request.id for request in site.model.requests)
        progress += [
            Progress(decoding, "decode", 100, 100, 128, 512, num_cached_tokens=90),
            Progress(reading, "prefill", 5000, 1000, 0, 512),
            Progress(waiting, "waiting", 700, 0, 0, 512, 0),
        ]
        rows = page.locator("#live tbody tr")
        await expect(rows).to_have_count(3)
        await expect(rows.nth(0)).to_contain_text("128 tokens, at most 512")
        await expect(rows.nth(0)).to_contain_text("90 %")
        await expect(rows.nth(1)).to_contain_text("1\u202f000 of 5\u202f000 prompt tokens")
        await expect(rows.nth(2)).to_contain_text("waiting (1)")
        site.model.gate.set()
        await asyncio.gather(*asked)
    await expect(rows).to_have_count(0)
    await expect(page.locator("#finished tbody tr")).to_have_count(3)
    await expect(page.locator("#memory")).to_contain_text("elevated, rising")
    await expect(page.locator("#memory")).to_contain_text("refuse new requests")
    await expect(page.locator("#cache")).to_contain_text("75 % (3 of 4)")
    await expect(page.locator("#cache")).to_contain_text("50 MiB of 100 MiB")
    await expect(page.locator("#cache .reasons")).to_contain_text("token N is the first that differs")
    await expect(page.locator("#tiles")).to_contain_text("50 %")
    await expect(page.locator("#checks details").first).to_contain_text("memory is 74 % full")
