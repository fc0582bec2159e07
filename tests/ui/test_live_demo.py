"""Both pages against the program as it is started, with the built-in model: what no stand-in can show."""

from __future__ import annotations

import asyncio
import base64
import json

import pytest
import pytest_asyncio

from tests.serving.process import serving
from tests.ui.test_chat_page import PICTURE, ask, done, expect

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def address(chromium, tmp_path_factory):
    """The server's, started only when there is a browser to look at it."""
    log = tmp_path_factory.mktemp("demo") / "log.txt"
    with serving("demo", log=log, is_awaited=False) as server:
        await asyncio.to_thread(server.wait_until_healthy)
        yield server.url


async def test_the_demo_model_answers_looks_thinks_fills_a_schema_and_is_watched(chromium, address):
    window = await chromium.new_context()
    page = await window.new_page()
    page.set_default_timeout(60_000)
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    await page.goto(address)
    await expect(page.locator("#model-name")).to_have_text("demo")
    await page.click("#open-panel")
    await page.fill("#temperature", "0")
    await page.fill("#max_tokens", "40")
    await page.click("#close-panel")

    await ask(page, "Reply with pong")
    await done(page)
    await expect(page.locator(".answer .prose:visible")).to_contain_text("pong")
    await expect(page.locator(".numbers[aria-label]")).to_contain_text("tokens/s")

    await page.set_input_files("#files", [{**PICTURE, "buffer": base64.b64decode(SQUARE)}])
    await ask(page, "What is in the picture?")
    await done(page, 2)

    await page.click("#think")
    await ask(page, "What is 2 + 3?")
    await done(page, 3)
    await expect(page.locator(".fold:visible summary")).to_contain_text("Thought for")
    await page.click("#think")

    await page.click("#json")
    boolean = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    await page.fill("#schema", json.dumps({**boolean, "additionalProperties": False}))
    await ask(page, "Is it?")
    await done(page, 4)
    text = await page.locator(".answer .code code").last.text_content()
    assert json.loads(text) in ({"ok": True}, {"ok": False})

    await page.goto(f"{address}/dashboard")
    await expect(page.locator("#finished tbody tr")).to_have_count(4)
    await expect(page.locator("#checks details").first).to_be_visible()
    await window.close()
    assert problems == []


# A red square of 64 pixels, as PNG.
SQUARE = (
    "iVBORw0KGgoAAAANSUhEUgAAAEAAAABACAIAAAAlC+aJAAAAUElEQVR42u3PQREAAAQAMCTRP41IUni42xospzs+q3hOQEBAQEBA"
    "QEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBA4N4ChoEBkImq48sAAAAASUVORK5CYII="
)
