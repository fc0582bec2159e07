"""Two hundred pictures and clips that nobody should send, at a real server: each a 400 that names its part, or an image
after all; then the server serves, and its log holds no error. And pictures that nearly are another one.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.generation.test_media import HOSTILE, WHOLE, animation, encode
from tests.serving.process import ServerProcess

QUESTION = {"type": "text", "text": "What is in the picture?"}
MENDED = ("GIF cut at 0.8", "WEBP cut at 0.8")  # what decoders make a picture of all the same


@pytest.fixture(scope="module")
def server(demo_process: ServerProcess) -> ServerProcess:
    return demo_process


def data_url(data: bytes, kind: str = "application/octet-stream") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def video(url: str) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}}


def ask(server: ServerProcess, *parts: dict[str, Any], **fields: Any) -> httpx.Response:
    body = {"model": "default", "max_tokens": 4, "temperature": 0.0, "enable_thinking": False,
            "messages": [{"role": "user", "content": [QUESTION, *parts]}], **fields}  # fmt: skip
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)


ADDRESSES = """
    127.0.0.1 127.1 2130706433 0x7f000001 0177.0.0.1 0.0.0.0 10.0.0.1 172.16.0.9 192.168.1.1 169.254.169.254 100.64.0.1
    224.0.0.1 255.255.255.255 [::1] [::] [fe80::1] [fc00::1] [::ffff:127.0.0.1] [::ffff:10.0.0.1] [64:ff9b::7f00:1]
    [2002:7f00:1::] [ff02::1] localhost user:password@127.0.0.1 127.0.0.1%2f@127.0.0.1
""".split()
SOURCES = [
    *(f"{scheme}://{address}/x.png" for scheme in ("http", "https") for address in ADDRESSES),
    "ftp://8.8.8.8/x.png", "gopher://8.8.8.8/", "javascript:alert(1)", "about:blank", "x.png", "../../etc/passwd",
    "//8.8.8.8/x", "http://", "http:///x", "https://:80/", "http://[bad", "http://\u0000/", "C:\\x.png",
    "data:", "data:image/png", "data:image/png;base64,", "data:image/png;base64,@@@@", "data:image/png;base64,AAA",
    "data:image/svg+xml,<svg/>", "data:;base64,%%%", "data:image/png,plain", "file://elsewhere/x.png", "file:x.png",
    "file:///nowhere/x.png", "/nowhere/x.png", "/", "/tmp", "/dev/zero", "/dev/random", "/dev/stdin", "/proc/self/mem",
    "/proc/self/environ", "/etc/passwd", "/etc/shadow", "/x\u0000.png", "/" + "x" * 5000, "/" + "x/" * 3000,
]  # fmt: skip


def damaged() -> Iterator[bytes]:
    rng = random.Random(5)
    for data in WHOLE.values():
        for _ in range(8):
            torn = bytearray(data)
            for _ in range(rng.randrange(1, 20)):
                torn[rng.randrange(len(torn))] = rng.randrange(256)
            yield bytes(torn)


def cases() -> list[tuple[str, dict[str, Any], bool]]:
    """(name, part, whether it must be refused)."""
    found: list[tuple[str, dict[str, Any], bool]] = []
    found += [(name, image(data_url(data)), name not in MENDED) for name, data in HOSTILE.items()]
    found += [(source[:60], image(source), True) for source in SOURCES]
    found += [(f"damaged {i}", image(data_url(data)), False) for i, data in enumerate(damaged())]
    found += [(f"{kind} called PDF", image(data_url(data, "application/pdf")), False) for kind, data in WHOLE.items()]
    wrong = {"PNG": "image/jpeg", "JPEG": "image/png", "WEBP": "image/gif", "GIF": "image/webp", "BMP": "image/tiff"}
    found += [(f"{kind} called {t}", image(data_url(WHOLE[kind], t)), True) for kind, t in wrong.items()]
    clip = animation()
    for name, data in {"empty": b"", "text": b"x", "cut": clip[:60], "mp4": b"\0\0\0\x18ftypmp42" + b"\0" * 99}.items():
        found.append((f"clip {name}", video(data_url(data)), True))
    found.append(("clip of a private address", video("http://127.0.0.1/x.mp4"), True))
    return found


def test_two_hundred_hostile_media_leave_the_server_serving(server):
    hostile = cases()
    assert len(hostile) >= 200
    good = image(data_url(encode(Image.new("RGB", (160, 160), "red"))))
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda case: ask(server, good, case[1]), hostile))
    for (name, _, must_fail), answer in zip(hostile, answers, strict=True):
        assert answer.status_code == 400 or (answer.status_code == 200 and not must_fail), (name, answer.text)
        if answer.status_code == 400:
            error = answer.json()["error"]
            assert error["param"].startswith("messages.0.content.2") and len(error["message"]) < 400, (name, error)
    assert ask(server, good).status_code == 200
    assert server.process.poll() is None
    assert "Traceback" not in server.output and " ERROR " not in server.output, server.output


def test_pictures_that_differ_in_one_pixel_never_share_an_entry(server):
    """Of the model's own size, so that no scaling can make them equal; anywhere, also in the last bytes."""
    pixels = np.random.default_rng(0).integers(0, 256, (160, 160, 3), dtype=np.uint8)
    places = [None, (0, 0, 0), (159, 159, 2), (80, 31, 1), (12, 150, 0)]

    def seen(place: tuple[int, int, int] | None) -> tuple[int, int]:
        changed = pixels.copy()
        if place is not None:
            changed[place] ^= 1
        before = httpx.get(f"{server.url}/v1/cache/stats").json()["num_encoder_runs"]
        messages = [{"role": "user", "content": [image(data_url(encode(Image.fromarray(changed)))), QUESTION]}]
        usage = ask(server, messages=messages).json()["usage"]
        after = httpx.get(f"{server.url}/v1/cache/stats").json()["num_encoder_runs"]
        return usage["prompt_tokens_details"]["cached_tokens"], after - before

    first = [seen(place) for place in places]
    again = [seen(place) for place in places]
    assert all(cached < 16 and runs == 1 for cached, runs in first), first
    assert all(cached > 16 and runs == 0 for cached, runs in again), again


def test_the_start_up_lines_say_where_media_may_come_from(server):
    (line,) = [line for line in server.output.splitlines() if "Media may come from" in line]
    assert "public http(s) addresses" in line and "--no-remote-media" in line and "--media-root" in line
