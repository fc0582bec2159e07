"""Does the chat page stay smooth? Streams a long answer into a headless Chromium and reports its longest task.

    python -m tools.page_jank [--tokens 5000] [--rate 200]

The answer is Markdown of every kind, with one code block and one list of a thousand tokens each, which are drawn anew
while they grow. A task of more than 100 ms would be felt. `longest_ms` is what the browser's long-task observer saw
(nothing under 50); `longest_cpu_ms` is the processor time of the page's longest task, from the browser's trace: on a
machine that does other things too, only the second is the page's own.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from typing import Any

from playwright.async_api import async_playwright

from tests.api.fakes import live_server, make_context
from tests.ui.conftest import find_chromium, seeing_model
from tests.ui.stand_in import MARKDOWN, StandIn, pieces
from vllm_mlx.generation.events import Accepted, Finished, GenerationUsage, OutputEvent
from vllm_mlx.generation.request import GenerationRequest
from vllm_mlx.parsers.events import TextDelta

LIMIT_MS = 100
CATEGORIES = ["toplevel", "disabled-by-default-devtools.timeline", "devtools.timeline"]
WATCH = """
globalThis.longTasks = [];
new PerformanceObserver((list) => { for (const task of list.getEntries()) longTasks.push(Math.round(task.duration)); })
  .observe({ type: "longtask", buffered: true });
"""


def long_answer(num_tokens: int) -> list[str]:
    lines = "".join(f"value_{i} = f(value_{i - 1}, 'text', {i})  # step\n" for i in range(1, 140))
    code = f"\n```python\n{lines}```\n\n"
    items = "".join(f"- item *{i}* with `code` and **strong** words\n" for i in range(140)) + "\n"
    text = pieces("\n\n") + pieces(code) + pieces(items)
    return list(itertools.islice(itertools.chain(text, itertools.cycle(pieces("\n\n" + MARKDOWN))), num_tokens))


class Writer(StandIn):
    """Writes at a steady rate: late pieces are made up for, as a server's are after a pause of the machine."""

    def __init__(self, text: list[str], rate: float) -> None:
        super().__init__()
        self.text, self.rate = text, rate

    async def generate(self, request: GenerationRequest) -> AsyncIterator[OutputEvent]:
        yield Accepted(request.id, 10)
        clock = asyncio.get_running_loop().time
        start = clock()
        for i, piece in enumerate(self.text):
            if (wait := start + i / self.rate - clock()) > 0:
                await asyncio.sleep(wait)
            yield TextDelta(piece)
        yield Finished("stop", GenerationUsage(10, len(self.text), 0))


async def measure(num_tokens: int, rate: float) -> dict[str, object]:
    context = make_context(Writer(long_answer(num_tokens), rate), model=seeing_model())
    async with live_server(context) as address, async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        page = await browser.new_page(viewport={"width": 1280, "height": 860})
        await page.add_init_script(WATCH)
        await page.goto(address)
        await page.locator("html[data-ready]").wait_for(state="attached")
        await page.evaluate("longTasks.length = 0")
        await browser.start_tracing(page=page, categories=CATEGORIES)
        await page.fill("#text", "go")
        await page.press("#text", "Enter")
        await page.locator(".numbers[aria-label]").wait_for(timeout=1000 * (num_tokens / rate + 60))
        trace = json.loads(await browser.stop_tracing())
        tasks = sorted(await page.evaluate("longTasks"), reverse=True)
        numbers = await page.locator(".numbers[aria-label]").text_content()
        await browser.close()
    cpu_ms = longest_cpu_ms(trace["traceEvents"])
    return {"longest_cpu_ms": cpu_ms, "longest_ms": tasks[0] if tasks else "below 50", "above_50_ms": len(tasks),
            "page_says": numbers, "is_smooth": cpu_ms <= LIMIT_MS}  # fmt: skip


def longest_cpu_ms(events: list[dict[str, Any]]) -> float:
    """Of the tasks on the pages' main threads."""
    mains = {(e["pid"], e["tid"]) for e in events if e.get("args", {}).get("name") == "CrRendererMain"}
    found = [e for e in events if e["name"].endswith("RunTask") and (e["pid"], e["tid"]) in mains]
    tasks = [event["tdur"] for event in found if "tdur" in event]
    assert tasks, "the trace holds no tasks"
    return round(max(tasks) / 1000, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=5000)
    parser.add_argument("--rate", type=float, default=200.0, help="tokens a second")
    arguments = parser.parse_args()
    result = asyncio.run(measure(arguments.tokens, arguments.rate))
    print(json.dumps(result, ensure_ascii=False))
    return 0 if result["is_smooth"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
