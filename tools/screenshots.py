"""Makes the pictures of docs/images: the chat page and the dashboard in their states, in a headless Chromium.

    python -m tools.screenshots [NAME ...]

All but `chat` show the program as it is started, with the built-in model. That model writes no code and no formulas, so
the model behind `chat` is scripted (tests/ui/stand_in.py); the page is the same.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import sys
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
from PIL import Image, ImageDraw
from playwright.async_api import Page, async_playwright

from tests.api.fakes import live_server, make_context
from tests.serving.process import ServerProcess, serving
from tests.ui.conftest import find_chromium, seeing_model
from tests.ui.stand_in import StandIn

FOLDER = Path(__file__).parents[1] / "docs/images"
WIDE, PHONE = (1200, 800), (390, 780)
STORY = "Write a short story about a lighthouse"
WORK_S = 75  # that the dashboard's server is at work before it is shown


class Studio:
    """One browser and one server; `shoot` saves what a page shows, with few colours."""

    def __init__(self, browser: Any, address: str, server: ServerProcess | None = None) -> None:
        self._browser = browser
        self.address = address
        self.server = server

    async def open(self, path: str = "/", *, size: tuple[int, int] = WIDE, **options: Any) -> Page:
        window = await self._browser.new_context(viewport={"width": size[0], "height": size[1]}, **options)
        page: Page = await window.new_page()
        await page.goto(self.address + path)
        await page.locator("html[data-ready]").wait_for(state="attached")
        if path == "/":
            await page.locator("#model:not([data-state=''])[data-state]").wait_for()
        return page

    async def ask(self, page: Page, text: str, num_answers: int = 1) -> None:
        await page.fill("#text", text)
        await page.press("#text", "Enter")
        await page.locator(".answer .numbers[aria-label]").nth(num_answers - 1).wait_for()

    async def begin_story(self, page: Page, words: str) -> None:
        await page.fill("#text", STORY)
        await page.press("#text", "Enter")
        await page.locator(".answer .prose", has_text=words).wait_for()

    async def shoot(self, page: Page, name: str, *, full_page: bool = False) -> None:
        await page.mouse.move(0, 0)
        await page.wait_for_timeout(400)  # transitions
        png = await page.screenshot(full_page=full_page)
        picture = Image.open(io.BytesIO(png)).convert("RGB").quantize(256, kmeans=3, dither=Image.Dither.NONE)
        FOLDER.mkdir(parents=True, exist_ok=True)
        picture.save(FOLDER / f"{name}.png", optimize=True)
        await page.context.close()


def drawing() -> bytes:
    """A little picture to talk about, of the kind that the built-in model knows: a red circle."""
    image = Image.new("RGB", (320, 320), "#ffffff")
    ImageDraw.Draw(image).ellipse((60, 60, 260, 260), fill="#d62828")
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


# ── the chat page ────────────────────────────────────────────────────────────────────────────────────────────────────


async def chat(studio: Studio) -> None:
    page = await studio.open(size=(1200, 1080))
    await page.click("#think")
    await studio.ask(page, "Explain binary search to me, with code.")
    await page.evaluate("document.getElementById('scroll').scrollTop = 0")
    await studio.shoot(page, "chat")


async def start(studio: Studio) -> None:
    page = await studio.open()
    await page.locator(".idea").first.wait_for()
    await studio.shoot(page, "chat-start")


async def reasoning(studio: Studio) -> None:
    page = await studio.open()
    await page.click("#think")
    await studio.ask(page, "What is 58 + 67?")
    await studio.ask(page, "Who are you?", 2)
    await page.locator(".fold:visible summary").first.click()
    await studio.shoot(page, "chat-reasoning")


async def picture(studio: Studio) -> None:
    page = await studio.open()
    file = {"name": "circle.png", "mimeType": "image/png", "buffer": drawing()}
    await page.set_input_files("#files", [file])
    await studio.ask(page, "What is in this picture?")
    await page.set_input_files("#files", [{**file, "name": "another.png"}])
    await page.fill("#text", "And in this one?")
    await studio.shoot(page, "chat-picture")


async def tools(studio: Studio) -> None:
    page = await studio.open()
    await page.click("#tools")
    await page.get_by_label("Clock").check()
    await page.get_by_label("Calculator").check()
    await page.keyboard.press("Escape")
    await studio.ask(page, "What is the time in Tokyo?")
    await page.click("#tools")
    await studio.shoot(page, "chat-tools")


async def json_schema(studio: Studio) -> None:
    page = await studio.open()
    await page.click("#json")
    await page.fill("#schema", """\
{"type": "object", "properties": {
  "age": {"type": "integer", "minimum": 0, "maximum": 120},
  "city": {"enum": ["Oslo", "Paris", "Rome"]}, "is_adult": {"type": "boolean"}},
  "required": ["age", "city", "is_adult"], "additionalProperties": false}""")
    await studio.ask(page, "Anna is 31 and lives in Rome.")
    await studio.shoot(page, "chat-json")


async def settings(studio: Studio) -> None:
    page = await studio.open()
    await studio.ask(page, "What can you do?")
    await page.click("#open-panel")
    await page.fill("#system", "You are terse.")
    await page.fill("#temperature", "0.7")
    await studio.shoot(page, "chat-settings")


async def branches(studio: Studio) -> None:
    page = await studio.open()
    await studio.ask(page, "My name is Ada.")
    await page.locator(".user").hover()
    await page.click("[aria-label='Edit message']")
    await page.fill("[aria-label='Edit message']", "My name is Tom.")
    await page.keyboard.press("Enter")
    await page.locator(".user .branches").wait_for()
    await page.locator(".answer .numbers[aria-label]").wait_for()
    await studio.ask(page, "What is my name?", 2)
    await page.locator(".user").nth(1).hover()
    await page.locator("[aria-label='Edit message']").nth(1).click()
    await studio.shoot(page, "chat-branches")


async def stop(studio: Studio) -> None:
    page = await studio.open()
    await studio.begin_story(page, "morning")
    await page.keyboard.press("Escape")
    await page.locator(".note").wait_for()
    await studio.shoot(page, "chat-stopped")


async def reload(studio: Studio) -> None:
    page = await studio.open()
    await studio.begin_story(page, "morning")
    await page.reload()
    await page.locator(".note.bad").wait_for()
    await studio.shoot(page, "chat-reloaded")


async def refused(studio: Studio) -> None:
    page = await studio.open()
    await studio.ask(page, "What can you do?")
    await page.fill("#text", "Tell me more about this. " * 2000)
    await page.press("#text", "Enter")
    await page.locator("#notice:visible").wait_for()
    await studio.shoot(page, "chat-refused")


async def phone(studio: Studio) -> None:
    page = await studio.open(size=PHONE)
    await page.click("#tools")
    await page.get_by_label("Calculator").check()
    await page.keyboard.press("Escape")
    await studio.ask(page, "What is 19 * 23?")
    await page.fill("#text", "And 58 + 67?")
    await studio.shoot(page, "chat-phone")


async def dark(studio: Studio) -> None:
    page = await studio.open(color_scheme="dark")
    await studio.ask(page, "What can you do?")
    await studio.ask(page, STORY, 2)
    await studio.shoot(page, "chat-dark")


async def key(studio: Studio) -> None:
    page = await studio.open()
    await page.locator("#keybox").wait_for()
    await page.fill("#text", "What can you do?")
    await page.fill("#key", "guess")
    await page.click("text=Use key")
    await page.locator("#key-why", has_text="not valid").wait_for()
    await studio.shoot(page, "chat-key")


async def gone(studio: Studio) -> None:
    """The last one: its server dies."""
    page = await studio.open()
    await page.fill("#key", "sesame")
    await page.click("text=Use key")
    await page.locator("#model[data-state=ready]").wait_for()
    await studio.begin_story(page, "morning")
    assert studio.server is not None
    studio.server.process.kill()
    await page.locator(".note.bad").wait_for()
    await page.locator("#model[data-state=gone]").wait_for()
    await page.fill("#text", "Nothing that was typed here is lost.")
    await page.press("#text", "Enter")
    await page.locator("#notice:visible").wait_for()
    await studio.shoot(page, "chat-server-gone")


Scene = Callable[[Studio], Awaitable[None]]
LIVE: list[Scene] = [
    start, reasoning, picture, tools, json_schema, settings, branches, stop, reload, refused, phone, dark,
]  # fmt: skip
LOCKED: list[Scene] = [key, gone]


# ── the dashboard of a busy server ───────────────────────────────────────────────────────────────────────────────────


async def dashboards(browser: Any, address: str) -> None:
    """Some clients talk to the server, each in its own way, until the pictures are taken."""
    studio = Studio(browser, address)
    views: dict[str, dict[str, Any]] = {
        "dashboard": {}, "dashboard-dark": {"color_scheme": "dark"}, "dashboard-phone": {"size": PHONE},
    }  # fmt: skip
    pages = {name: await studio.open("/dashboard", **options) for name, options in views.items()}
    async with httpx.AsyncClient(base_url=address, timeout=300) as client:
        clients = [asyncio.create_task(converse(client, i)) for i in range(4)]
        await asyncio.sleep(WORK_S)
        hello = [{"role": "user", "content": "Hello"}]
        await client.post("/v1/chat/completions", json={"messages": hello, "temperature": -1})
        await client.post("/v1/chat/completions", json={"messages": hello, "model": "demo", "max_tokens": 90_000})
        for name, page in pages.items():
            await page.bring_to_front()
            await page.locator("#live tbody tr").nth(2).wait_for()
            await studio.shoot(page, name, full_page=name == "dashboard-dark")
        for task in clients:
            task.cancel()
        await asyncio.gather(*clients, return_exceptions=True)


async def converse(client: httpx.AsyncClient, number: int) -> None:
    """Longer and longer conversations, one after the other."""
    things = itertools.cycle(["lighthouse", "fox", "clock", "river", "ship"][number:] + ["tree", "bear"])
    for thing in things:
        messages: list[dict[str, str]] = []
        for text in ("My name is Ada.", f"Write a short story about a {thing}", "What is my name?", "What can you do?"):
            messages.append({"role": "user", "content": text})
            if number == 3:
                body = {"model": "demo", "messages": messages, "max_tokens": 400}
                answer = (await client.post("/v1/messages", json=body)).json()["content"][0]["text"]
            else:
                body = {"messages": messages, "max_tokens": 300 + 100 * number}
                answered = (await client.post("/v1/chat/completions", json=body)).json()
                answer = answered["choices"][0]["message"]["content"]
            messages.append({"role": "assistant", "content": answer})
            await asyncio.sleep(0.3 * number)


async def main(wanted: set[str]) -> None:
    def chosen(scenes: list[Scene]) -> list[Scene]:
        return [scene for scene in scenes if not wanted or scene.__name__ in wanted]

    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        if not wanted or "chat" in wanted:
            model = seeing_model(id="Qwen3-VL-4B-Instruct-4bit")
            async with live_server(make_context(StandIn(delay_s=0.002), model=model)) as address:
                await chat(Studio(browser, address))
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            if scenes := chosen(LIVE):
                server = stack.enter_context(serving("demo", log=folder / "log"))
                for scene in scenes:
                    await scene(Studio(browser, server.url))
            if scenes := chosen(LOCKED):
                locked = stack.enter_context(serving("demo", "--api-key", "sesame", log=folder / "locked"))
                for scene in scenes:
                    await scene(Studio(browser, locked.url, locked))
            if not wanted or "dashboards" in wanted:
                busy = stack.enter_context(serving("demo", "--continuous-batching", log=folder / "busy"))
                await dashboards(browser, busy.url)
        await browser.close()


if __name__ == "__main__":
    asyncio.run(main(set(sys.argv[1:])))
