"""Makes the pictures of docs/images: the chat page and the dashboard in their states, in a headless Chromium.

    python -m tools.screenshots [NAME ...]

The pages are the real ones on the real application; the model behind them is scripted (tests/ui/stand_in.py), so that
the pictures are the same each time and show what a large model would write.
"""

from __future__ import annotations

import asyncio
import io
import random
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from PIL import Image, ImageDraw
from playwright.async_api import Page, async_playwright

from tests.api.fakes import FakeGeneration, chat_body, live_server, make_context, says, until
from tests.ui.conftest import find_chromium, seeing_model
from tests.ui.stand_in import StandIn
from vllm_mlx.api import dashboard
from vllm_mlx.engine.step import EngineStatus, Progress
from vllm_mlx.observability.journal import FinishedRequest, Journal, RequestFacts

FOLDER = Path(__file__).parents[1] / "docs/images"
MODEL = seeing_model(id="Qwen3-VL-4B-Instruct-4bit")
WIDE, PHONE = (1200, 800), (390, 780)
NUM_TICKS = 240


class Studio:
    """One browser and one server; `shoot` saves what a page shows, with few colours."""

    def __init__(self, browser: Any, address: str, model: StandIn) -> None:
        self._browser = browser
        self.address = address
        self.model = model

    async def open(self, path: str = "/", *, size: tuple[int, int] = WIDE, **options: Any) -> Page:
        window = await self._browser.new_context(viewport={"width": size[0], "height": size[1]}, **options)
        page: Page = await window.new_page()
        await page.goto(self.address + path)
        await page.locator("html[data-ready]").wait_for(state="attached")
        return page

    async def ask(self, page: Page, text: str, num_answers: int = 1) -> None:
        await page.fill("#text", text)
        await page.press("#text", "Enter")
        await page.locator(".answer .numbers[aria-label]").nth(num_answers - 1).wait_for()

    async def shoot(self, page: Page, name: str, *, full_page: bool = False) -> None:
        await page.wait_for_timeout(250)  # transitions
        png = await page.screenshot(full_page=full_page)
        picture = Image.open(io.BytesIO(png)).convert("RGB").quantize(200, dither=Image.Dither.NONE)
        FOLDER.mkdir(parents=True, exist_ok=True)
        picture.save(FOLDER / f"{name}.png", optimize=True)
        await page.context.close()


def drawing() -> bytes:
    """A little picture to talk about: a lighthouse at dusk."""
    image = Image.new("RGB", (480, 320), "#f2c48d")
    draw = ImageDraw.Draw(image)
    draw.ellipse((330, 60, 410, 140), fill="#f7e3b5")
    draw.rectangle((0, 220, 480, 320), fill="#2f5d73")
    draw.polygon([(60, 240), (220, 240), (190, 200), (90, 200)], fill="#4a4038")
    draw.polygon([(120, 200), (160, 200), (152, 80), (128, 80)], fill="#fbf7ef")
    draw.rectangle((125, 62, 155, 80), fill="#b4452f")
    for y in (105, 145, 185):
        draw.line((124, y, 156, y), fill="#b4452f", width=9)
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


async def chat(studio: Studio) -> None:
    page = await studio.open(size=(1200, 1080))
    await page.click("#think")
    await studio.ask(page, "Explain binary search to me, with code.")
    await page.evaluate("document.getElementById('scroll').scrollTop = 0")
    await studio.shoot(page, "chat")


async def dark(studio: Studio) -> None:
    page = await studio.open(color_scheme="dark")
    await studio.ask(page, "Explain binary search to me, with code.")
    await studio.shoot(page, "chat-dark")


async def phone(studio: Studio) -> None:
    page = await studio.open(size=PHONE)
    await studio.ask(page, "Explain binary search to me, with code.")
    await page.evaluate("document.getElementById('scroll').scrollTop = 0")
    await studio.shoot(page, "chat-phone")


async def picture(studio: Studio) -> None:
    page = await studio.open()
    file = {"name": "lighthouse.png", "mimeType": "image/png", "buffer": drawing()}
    await page.set_input_files("#files", [file])
    await studio.ask(page, "What is in this picture?")
    await page.set_input_files("#files", [{**file, "name": "another.png"}])
    await page.fill("#text", "And in this one?")
    await studio.shoot(page, "chat-picture")


async def tools(studio: Studio) -> None:
    page = await studio.open()
    await page.click("#think")
    await page.click("#tools")
    await page.get_by_label("Clock").check()
    await page.get_by_label("Calculator").check()
    await page.keyboard.press("Escape")
    await studio.ask(page, "What is the time in Tokyo?")
    await page.locator(".fold summary").first.click()
    await page.click("#tools")
    await studio.shoot(page, "chat-tools")


async def json_schema(studio: Studio) -> None:
    page = await studio.open()
    await page.click("#json")
    schema = '{"type": "object", "properties": {\n  "city": {"type": "string"}, "people": {"type": "integer"}}}'
    await page.fill("#schema", schema)
    await studio.ask(page, "Which is the capital of Italy, and how many live there?")
    await studio.shoot(page, "chat-json")


async def settings(studio: Studio) -> None:
    page = await studio.open()
    await studio.ask(page, "Hello")
    await page.click("#open-panel")
    await page.fill("#system", "You are terse.")
    await page.fill("#temperature", "0.7")
    await studio.shoot(page, "chat-settings")


async def branches(studio: Studio) -> None:
    page = await studio.open()
    await studio.ask(page, "Name a colour.")
    await page.locator(".user").hover()
    await page.click("[aria-label='Edit message']")
    await page.fill("[aria-label='Edit message']", "Name a shape.")
    await page.keyboard.press("Enter")
    await page.locator(".user .branches").wait_for()
    await page.locator(".answer .numbers[aria-label]").wait_for()
    await studio.ask(page, "Another one?", 2)
    await page.locator(".user").nth(1).hover()
    await page.locator("[aria-label='Edit message']").nth(1).click()
    await studio.shoot(page, "chat-branches")


async def stop(studio: Studio) -> None:
    page = await studio.open()
    studio.model.delay_s = 0.01
    await page.fill("#text", "Write me a long one.")
    await page.press("#text", "Enter")
    await page.locator(".answer .prose", has_text="word30").wait_for()
    await page.keyboard.press("Escape")
    await page.locator(".note").wait_for()
    await studio.shoot(page, "chat-stopped")


async def gone(studio: Studio) -> None:
    page = await studio.open()
    await page.locator("#model[data-state=ready]").wait_for()
    await page.route("**/v1/**", lambda route: route.abort())
    await page.fill("#text", "Nothing that was typed here is lost.")
    await page.press("#text", "Enter")
    await page.locator("#model[data-state=gone]").wait_for()
    await studio.shoot(page, "chat-server-gone")


async def key(studio: Studio) -> None:
    page = await studio.open()
    await page.route("**/v1/**", lambda route: route.fulfill(
        status=401, json={"error": {"message": "This API key is not valid here."}}))
    await page.fill("#text", "Hello")
    await page.press("#text", "Enter")
    await page.locator("#keybox").wait_for()
    await studio.shoot(page, "chat-key")


SCENES: dict[str, Callable[[Studio], Awaitable[None]]] = {
    scene.__name__: scene
    for scene in (chat, dark, phone, picture, tools, json_schema, settings, branches, stop, gone, key)
}


# ── the dashboard of a busy server ──────────────────────────────────────────────────────────────────────────────────


class Busy:
    """A server at work. Its clock is read once a tick and moves on by a second; what happened meanwhile is made up."""

    def __init__(self, journal: Journal) -> None:
        self._dice = random.Random(7)
        self._journal = journal
        self._now = time.time() - NUM_TICKS
        self._speed, self._reading = 130.0, 300.0
        self._completion, self._prompt, self._cached = 90_000, 410_000, 301_000
        self.progress: list[Progress] = []
        for _ in range(NUM_TICKS):
            self.time()
        journal.add_problem(
            "HTTP 400: POST /v1/chat/completions",
            "Invalid value for 'temperature': input should be greater than or equal to 0.")  # fmt: skip
        journal.add_problem("log: guards.memory", "memory is elevated: 11.8 of 16.0 GiB (74 %)")

    def time(self) -> float:
        dice = self._dice
        self._now += 1
        self._speed = min(190.0, max(70.0, self._speed + dice.uniform(-12, 12)))
        self._reading = min(900.0, max(0.0, self._reading + dice.uniform(-90, 90)))
        self._completion += int(self._speed)
        self._prompt += int(self._reading)
        self._cached += int(self._reading * dice.uniform(0.6, 0.8))
        if dice.random() < 0.25:
            self._finish()
        return self._now

    def _finish(self) -> None:
        dice = self._dice
        first, num_prompt = dice.uniform(0.08, 0.6), dice.randint(300, 4000)
        self._journal.note(FinishedRequest(
            RequestFacts(f"chatcmpl-{dice.getrandbits(48):012x}", route=dice.choice(("chat", "chat", "messages"))),
            dice.choice(("stop",) * 7 + ("length", "tool_calls")), self._now, first + dice.uniform(0.6, 6),
            ttft_s=first, queue_s=dice.uniform(0.001, 0.02), num_prompt_tokens=num_prompt,
            num_completion_tokens=dice.randint(40, 500),
            num_cached_tokens=int(num_prompt * dice.choice((0, 0.5, 0.8, 0.95))),
            miss_reason=dice.choice((None, "token 412 is the first that differs from every stored prefix")),
        ))  # fmt: skip

    def status(self) -> EngineStatus:
        now = time.monotonic()
        return EngineStatus(
            num_running=3, num_waiting=1, num_steps=90_000, batch_rows=3, kv_bytes=410 << 20, kv_budget_bytes=4 << 30,
            prefix_cache_bytes=1300 << 20, prefix_cache_budget_bytes=3 << 30, num_prefix_hits=214,
            num_prefix_misses=31, num_cached_tokens=self._cached, num_prompt_tokens=self._prompt,
            num_completion_tokens=self._completion, num_evictions=12,
            requests=tuple(replace(p, arrived=now - 6, first_token=p.first_token and now - 4) for p in self.progress),
        )  # fmt: skip


MEMORY = {
    "backend": "metal", "active_gb": 3.4, "peak_gb": 4.1, "weights_gb": 2.4, "pressure": "elevated", "trend": "steady",
    "utilization_pct": 74.2, "process_bytes": int(11.8 * 2**30), "process_capacity_bytes": 16 << 30,
    "warn_threshold_pct": 70, "limit_threshold_pct": 85, "action": "reduce-context", "times_elevated": 1,
    "times_critical": 0,
}  # fmt: skip
CHECKS = {
    "memory": {"status": "warning", "detail": "memory is 74 % full, over --memory-warn-threshold 70", "metadata": {}},
    "batch_divergence": {"status": "pass", "detail": "agreement 1.000 over the last replays", "metadata": {}},
    "repetition": {"status": "pass", "detail": "2 answers were ended in a loop", "metadata": {}},
    "runtime_mode": {"status": "pass", "detail": "at most 8 rows now", "metadata": {"row_limit": 8}},
}


async def dashboards(browser: Any, wanted: set[str]) -> None:
    model, over = FakeGeneration(), asyncio.Event()
    model.script = lambda request: [over.wait, *says("x")]
    context = make_context(model, model=MODEL, read_memory=lambda: MEMORY, health_checks=lambda: CHECKS)
    context.started -= 5000
    busy = Busy(context.journal)
    context.read_status = busy.status
    # Minutes of its life pass in seconds: the clock that dates the ticks is the script's.
    dashboard.time = busy
    dashboard.events.__kwdefaults__["tick_s"] = 0.015
    async with live_server(context) as address, httpx.AsyncClient(timeout=None) as client:
        url = f"{address}/v1/chat/completions"
        asked = [asyncio.create_task(client.post(url, json=chat_body(stream=i < 3))) for i in range(4)]
        await until(lambda: len(model.running) == 4)
        ids = [request.id for request in model.requests]
        busy.progress[:] = [
            Progress(ids[0], "decode", 1240, 1240, 210, 512, None, 0, 1.0, 1200),
            Progress(ids[1], "decode", 860, 860, 377, 512, None, 0, 1.0, 64),
            Progress(ids[2], "prefill", 5200, 2048, 0, 1024, None, 0, None, 512),
            Progress(ids[3], "waiting", 700, 0, 0, 512, 0),
        ]
        studio = Studio(browser, address, StandIn())
        for name, options in (("dashboard", {}), ("dashboard-dark", {"color_scheme": "dark"}),
                              ("dashboard-phone", {"size": PHONE})):  # fmt: skip
            if wanted and name not in wanted:
                continue
            page = await studio.open("/dashboard", **options)
            await page.locator("#live tbody tr").nth(3).wait_for()
            await page.wait_for_timeout(6000)
            await studio.shoot(page, name, full_page=name == "dashboard-dark")
        over.set()
        await asyncio.gather(*asked)


async def main(wanted: set[str]) -> None:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        for name, scene in SCENES.items():
            if wanted and name not in wanted:
                continue
            model = StandIn(delay_s=0.002)
            async with live_server(make_context(model, model=MODEL)) as address:
                await scene(Studio(browser, address, model))
        if not wanted or any(name.startswith("dashboard") for name in wanted):
            await dashboards(browser, wanted)
        await browser.close()


if __name__ == "__main__":
    asyncio.run(main(set(sys.argv[1:])))
