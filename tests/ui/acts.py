"""What a person does in the chat page, and what they wait for."""

from __future__ import annotations

import struct
import zlib
from typing import Any


def expect(target: Any) -> Any:
    from playwright.async_api import expect as playwright_expect  # not installed everywhere

    playwright_expect.set_options(timeout=30_000)
    return playwright_expect(target)


async def ask(page: Any, text: str) -> None:
    await page.fill("#text", text)
    await page.press("#text", "Enter")


async def done(page: Any, num_answers: int = 1) -> None:
    """So many answers have their numbers under them."""
    await expect(page.locator(".answer .numbers[aria-label]")).to_have_count(num_answers)


def words(page: Any) -> Any:
    """The text of the answer, not of what was thought before it."""
    return page.locator(".answer .prose:visible")


async def assert_nothing_scrolls_sideways(page: Any, width: int) -> None:
    boxes = "[...document.querySelectorAll('html, #scroll')].map(el => el.scrollWidth)"
    assert max(await page.evaluate(boxes)) <= width


def png(side: int = 64, colour: bytes = b"\xe0\x20\x20") -> bytes:
    """A square of one colour (red, green, blue)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + colour * side for _ in range(side))
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


PICTURE = {"name": "red.png", "mimeType": "image/png", "buffer": png()}
