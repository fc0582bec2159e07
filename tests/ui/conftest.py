"""A headless Chromium, or a skip that says what is missing, and two kinds of server to look at with it.

`demo` and `locked` are pages of the program as it is started, with the built-in model, one process each. `site`
is the real application in this process over a scripted model, for what no model can be asked to do: to be slow, to
fail, to write dangerous Markdown. The pages' policy forbids evaluated code, so tests wait with `expect`, never with
scripts of their own.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.api.fakes import live_server, make_context
from tests.serving.process import ServerProcess, serving
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
class Window:
    """The pages that a test opened on one server. What they log as an error is a problem."""

    address: str
    open: Callable[..., Any]
    problems: list[str] = field(default_factory=list)


@asynccontextmanager
async def window_on(chromium: Any, address: str) -> AsyncIterator[Window]:
    """A page that logs an error (a script's, a broken policy, a missing file) fails the test."""
    problems: list[str] = []
    async with AsyncExitStack() as stack:

        async def open_page(path: str = "/", *, routes: Mapping[str, Any] | None = None, **options: Any) -> Any:
            """`routes`: addresses that are answered with this JSON instead of by the server."""
            size = options.pop("size", (1280, 860))
            context = await chromium.new_context(viewport={"width": size[0], "height": size[1]}, **options)
            stack.push_async_callback(context.close)
            page = await context.new_page()
            page.set_default_timeout(30_000)
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
            for pattern, body in (routes or {}).items():
                await page.route(pattern, lambda route, request, body=body: route.fulfill(json=body))
            await page.goto(address + path)
            await page.locator("html[data-ready]").wait_for(state="attached")
            return page

        yield Window(address, open_page, problems)
    # What the server answers with an error status, and that it cannot be reached, the browser logs by itself.
    own = ("Failed to load resource", "net::ERR_")
    assert [text for text in problems if not any(words in text for words in own)] == []


# ── the program with the built-in model ──────────────────────────────────────────────────────────────────────────────


class Locked:
    """A server that wants the key `sesame` and takes small requests only; it can be killed and started again."""

    def __init__(self, stack: ExitStack, log: Path) -> None:
        self._stack, self._log = stack, log
        self.process = self._start(None)

    def _start(self, port: int | None) -> ServerProcess:
        flags = ("--api-key", "sesame", "--max-body-mb", "0.05")
        return self._stack.enter_context(serving("demo", *flags, log=self._log, port=port, is_awaited=False))

    @property
    def url(self) -> str:
        return self.process.url

    async def until_ready(self) -> None:
        await asyncio.to_thread(self.process.wait_until_healthy)

    def kill(self) -> None:
        self.process.process.kill()
        self.process.process.wait()

    def start_again(self) -> None:
        self.process = self._start(self.process.port)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def locked_server(chromium: Any, tmp_path_factory: Any) -> AsyncIterator[Locked]:
    with ExitStack() as stack:
        server = Locked(stack, tmp_path_factory.mktemp("locked") / "log")
        await server.until_ready()
        yield server


@pytest_asyncio.fixture(loop_scope="session")
async def demo(chromium: Any, demo_process: ServerProcess) -> AsyncIterator[Window]:
    async with window_on(chromium, demo_process.url) as window:
        yield window


@pytest_asyncio.fixture(loop_scope="session")
async def locked(chromium: Any, locked_server: Locked) -> AsyncIterator[Window]:
    async with window_on(chromium, locked_server.url) as window:
        yield window


# ── the application over a scripted model ────────────────────────────────────────────────────────────────────────────


@dataclass
class Site:
    model: StandIn
    context: ServerContext
    address: str
    open: Callable[..., Any]


@pytest_asyncio.fixture(loop_scope="session")
async def site(request: Any, chromium: Any) -> AsyncIterator[Site]:
    """A server of its own for each test; an indirect parameter changes fields of its context."""
    changes = dict(getattr(request, "param", {}))
    model = StandIn()
    context = make_context(model, model=changes.pop("model", seeing_model()), **changes)
    async with live_server(context) as address, window_on(chromium, address) as window:
        yield Site(model, context, address, window.open)
