"""Claims about the `serve` command as a process: exit codes, one-line causes, and an end in good order under load."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import socket
import struct
import time
from pathlib import Path

import httpx
import pytest

from tests.api.fakes import sse_payloads
from tests.serving.process import serving
from vllm_mlx.models.download import resolve

LONG = {"model": "x", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4000, "ignore_eos": True}


def test_sigterm_under_load_answers_everybody_and_ends_the_process(tiny_model, tmp_path):
    flags = ["--shutdown-timeout", "0.2", "--continuous-batching", "--repetition-policy", "off"]
    with serving(tiny_model("qwen3"), *flags, log=tmp_path / "log") as server:

        async def run() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
                answers = [
                    asyncio.create_task(client.post("/v1/chat/completions", json={**LONG, "stream": stream}))
                    for stream in (True, False, True, False)
                ]
                while (await client.get("/v1/status")).json()["num_running"] < 4:
                    await asyncio.sleep(0.01)
                server.signal(signal.SIGTERM)
                return await asyncio.gather(*answers)

        responses = asyncio.run(run())
        assert server.wait() == 0
        for response in responses[0::2]:
            assert "error" in sse_payloads(response.text)[-1]
        for response in responses[1::2]:
            assert response.status_code >= 500 and response.json()["error"]["message"]
        assert "Traceback" not in server.output, server.output


def test_sigterm_while_loading_ends_the_process_at_once(tiny_model, tmp_path):
    with serving(tiny_model("qwen3"), log=tmp_path / "log", is_awaited=False) as server:
        limit = time.monotonic() + 60
        while time.monotonic() < limit:
            try:
                httpx.get(f"{server.url}/health", timeout=5)
                break
            except httpx.TransportError:
                time.sleep(0.02)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert "Traceback" not in server.output, server.output


def cut_short(folder: Path) -> None:
    weights = folder / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size // 2)


def of_an_unknown_kind(folder: Path) -> None:
    """Every file is there, also for the multimodal library, which logs what it does not know before it raises."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "wonderformer"}))


def too_large(folder: Path) -> None:
    """Two hundred gigabytes, all of them holes."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [50000, 10**6], "data_offsets": [0, 2 * 10**11]}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 2 * 10**11)


@pytest.mark.parametrize("spoil", [shutil.rmtree, cut_short, of_an_unknown_kind, too_large], ids=lambda f: f.__name__)
def test_a_model_that_cannot_be_served_is_one_line_and_exit_code_1(spoil, tmp_path):
    folder = Path(shutil.copytree(resolve("demo"), tmp_path / "model"))
    spoil(folder)
    with serving(folder, log=tmp_path / "log", is_awaited=False) as server:
        assert server.wait() == 1
        lines = server.output.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("vllm-mlx: "), server.output


def test_a_port_in_use_is_one_line_and_exit_code_1(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with serving("demo", "--port", str(taken.getsockname()[1]), log=tmp_path / "log", is_awaited=False) as server:
            assert server.wait() == 1
            (line,) = server.output.strip().splitlines()
            assert "another" in line and "--port" in line
