"""A headless Chromium over the real application, or a skip that says what is missing.

The pages' policy forbids evaluated code, so tests wait with `expect`, never with scripts of their own.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.api.fakes import live_server, make_context
from tests.ui.stand_in import StandIn
from vllm_mlx.api.context import ServedModel, ServerContext

PLACES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge")
MAC = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")


def find_chromium() -> str | None:
    found = [os.environ.get("CHROMIUM"), *(shutil.which(name) for name in PLACES), str(MAC) if MAC.exists() else None]
    return next((place for place in found if place), None)


def seeing_model(**changes: Any) -> ServedModel:
    facts = {
        "id": "demo-vl", "fingerprint": "fp", "context_tokens": 32768, "max_context_tokens": 262144, "vocab_size": 300,
        "modalities": frozenset({"text", "image"}), "tool_parser": "hermes", "reasoning_parser": "qwen3",
        "quantization": "4-bit",
    }  # fmt: skip
    return ServedModel(**{**facts, **changes})


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def chromium() -> AsyncIterator[Any]:
    try:
        from playwright.async_api import async_playwright
    except ImportError:
        pytest.skip("playwright is not installed")
    executable = find_chromium()
    if executable is None:
        pytest.skip("there is no Chromium on this machine (apt-get install chromium, or set CHROMIUM)")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        await browser.close()


@dataclass
class Site:
    """One server and the pages a test opened on it."""

    model: StandIn
    context: ServerContext
    address: str
    open: Callable[..., Any]
    problems: list[str] = field(default_factory=list)


@pytest_asyncio.fixture(loop_scope="session")
async def site(request: Any, chromium: Any) -> AsyncIterator[Site]:
    """A server of its own for each test; an indirect parameter changes fields of its context.

    A page that logs an error (a script's, a broken policy, a missing file) fails the test.
    """
    changes = dict(getattr(request, "param", {}))
    model = StandIn()
    context = make_context(model, model=changes.pop("model", seeing_model()), **changes)
    problems: list[str] = []
    async with AsyncExitStack() as stack:
        address = await stack.enter_async_context(live_server(context))

        async def open_page(path: str = "/", *, routes: Mapping[str, Any] | None = None, **options: Any) -> Any:
            """`routes`: addresses that are answered with this JSON instead of by the server."""
            size = options.pop("size", (1280, 860))
            window = await chromium.new_context(viewport={"width": size[0], "height": size[1]}, **options)
            stack.push_async_callback(window.close)
            page = await window.new_page()
            page.set_default_timeout(20_000)
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
            for pattern, body in (routes or {}).items():
                await page.route(pattern, lambda route, request, body=body: route.fulfill(json=body))
            await page.goto(address + path)
            await page.locator("html[data-ready]").wait_for(state="attached")
            return page

        yield Site(model, context, address, open_page, problems)
    # What the server answers with an error status, the browser logs by itself.
    assert [text for text in problems if "Failed to load resource" not in text] == []
