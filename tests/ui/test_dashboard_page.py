"""The dashboard as a person sees it, in a headless Chromium against the real application and a scripted model."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import httpx
import pytest

from tests.api.fakes import chat_body, until
from tests.ui.test_chat_page import expect
from vllm_mlx.engine.step import EngineStatus, Progress

pytestmark = pytest.mark.asyncio(loop_scope="session")

MEMORY = {
    "backend": "cpu", "pressure": "elevated", "utilization_pct": 74.2, "trend": "rising", "action": "reject-new",
    "process_bytes": 3 << 30, "process_capacity_bytes": 4 << 30, "warn_threshold_pct": 70, "limit_threshold_pct": 85,
    "times_elevated": 2, "times_critical": 0, "weights_gb": 1.5, "active_gb": 2.0, "peak_gb": 2.5,
}  # fmt: skip
CHECKS = {"memory": {"status": "warning", "detail": "memory is 74 % full", "metadata": {"trend": "rising"}}}


@pytest.mark.parametrize("site", [{"read_memory": lambda: MEMORY, "health_checks": lambda: CHECKS}], indirect=True)
async def test_a_live_request_is_seen_and_cancelled_and_appears_among_the_finished(site):
    status = EngineStatus(
        batch_rows=1, num_running=1, kv_bytes=50 << 20, kv_budget_bytes=100 << 20,
        num_prefix_hits=3, num_prefix_misses=1, num_cached_tokens=30, num_prompt_tokens=60,
    )  # fmt: skip
    progress: list[Progress] = []
    site.context.read_status = lambda: replace(status, requests=tuple(progress))
    page = await site.open("/dashboard")
    await expect(page.locator("#live-none")).to_be_visible()
    site.model.gate.clear()
    async with httpx.AsyncClient(timeout=60) as client:
        asked = asyncio.create_task(client.post(f"{site.address}/v1/chat/completions", json=chat_body()))
        await until(lambda: len(site.model.running) == 1)
        progress.append(Progress(next(iter(site.model.running)), "decode", 100, 100, 128, 512, num_cached_tokens=90))
        row = page.locator("#live tbody tr")
        await expect(row).to_contain_text("128 tokens, at most 512")
        await expect(row).to_contain_text("90 %")
        await row.locator("[aria-label^=Cancel]").click()
        await until(lambda: site.model.cancelled != [])
        site.model.gate.set()
        assert (await asked).json()["choices"][0]["stop_reason"] == "cancelled"
    progress.clear()
    await expect(page.locator("#finished tbody tr")).to_contain_text("cancelled")
    await expect(row).to_have_count(0)
    await expect(page.locator("#memory")).to_contain_text("elevated, rising")
    await expect(page.locator("#memory")).to_contain_text("refuse new requests")
    await expect(page.locator("#cache")).to_contain_text("75 % (3 of 4)")
    await expect(page.locator("#cache")).to_contain_text("50 MiB of 100 MiB")
    await expect(page.locator("#tiles")).to_contain_text("50 %")
    await expect(page.locator("#checks details").first).to_contain_text("memory is 74 % full")
    await expect(page.locator("#can")).to_contain_text("demo-vl")
    plot = page.locator("#plots canvas").first
    await expect(plot).to_have_attribute("aria-label", "Generated tokens/s: tokens/s 0.0")


async def test_what_went_wrong_and_why_reuse_ended_are_shown(site):
    page = await site.open("/dashboard")
    async with httpx.AsyncClient() as client:
        await client.post(f"{site.address}/v1/chat/completions", json=chat_body(temperature=-1))
    await expect(page.locator("#problems li")).to_contain_text("temperature")
    site.context.journal.miss_reasons["token N is the first that differs"] += 2
    await expect(page.locator("#cache .reasons")).to_contain_text("token N is the first that differs")


@pytest.mark.parametrize("site", [{"api_keys": {"default": "sesame"}}], indirect=True)
async def test_the_dashboard_asks_for_the_key(site):
    page = await site.open("/dashboard")
    await page.fill("#key", "wrong")
    await page.keyboard.press("Enter")
    await expect(page.locator("#key-why")).to_contain_text("not valid")
    await page.fill("#key", "sesame")
    await page.keyboard.press("Enter")
    await expect(page.locator("#state-text")).to_contain_text("demo-vl")


async def test_a_server_that_is_gone_is_said_and_found_again(site):
    page = await site.open("/dashboard")
    await expect(page.locator("#state")).to_have_class("good")
    await page.route("**/v1/**", lambda route: route.abort())
    await page.reload()
    await expect(page.locator("#state-text")).to_contain_text("cannot be reached")
    await page.unroute("**/v1/**")
    await expect(page.locator("#state")).to_have_class("good")


async def test_a_phone_shows_the_dashboard_without_sideways_scrolling(site):
    page = await site.open("/dashboard", size=(360, 740), color_scheme="dark")
    await expect(page.locator("#can")).to_contain_text("demo-vl")
    assert await page.evaluate("document.documentElement.scrollWidth") == 360
