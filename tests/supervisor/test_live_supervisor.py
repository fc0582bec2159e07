"""A real front and a real engine's process that is killed: nobody but the log notices, or is told."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.serving.process import ServerProcess, serving


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[ServerProcess]:
    with serving("demo", "--engine-process", log=tmp_path_factory.mktemp("front") / "log") as running:
        yield running
        running.signal()
        assert running.wait() == 0, running.output


def engine_of(server: ServerProcess) -> dict:
    return httpx.get(f"{server.url}/health", timeout=10).json()["engine_process"]


def ask(server: ServerProcess, **fields) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "Reply with pong"}], "max_tokens": 8, **fields}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)


def test_requests_around_a_crash_are_all_answered_and_health_never_hangs(server) -> None:
    assert "pong" in ask(server).text
    before = engine_of(server)
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(ask, server) for _ in range(3)]
        os.kill(before["pid"], signal.SIGKILL)
        answers += [pool.submit(ask, server) for _ in range(3)]
        while engine_of(server)["num_crashes"] == before["num_crashes"]:
            pass
        assert all("pong" in answer.result().text for answer in answers)
    after = engine_of(server)
    assert after["pid"] != before["pid"] and after["last_crash"] == "it was ended by SIGKILL"


def test_a_stream_that_had_begun_is_told_and_the_next_is_answered(server) -> None:
    pid = engine_of(server)["pid"]
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4000, "ignore_eos": True, "stream": True,
            "repetition_policy_override": "off"}  # fmt: skip
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=120) as response:
        lines = response.iter_lines()
        next(line for line in lines if '"content":"' in line)
        os.kill(pid, signal.SIGKILL)
        rest = [line for line in lines if line.startswith("data: ")]
    assert rest[-1] == "data: [DONE]" and "ended while" in json.loads(rest[-2][6:])["error"]["message"]
    assert "pong" in ask(server).text


def test_the_engine_ends_with_its_front(tmp_path) -> None:
    with serving("demo", "--engine-process", log=tmp_path / "log") as server:
        pid = engine_of(server)["pid"]
        server.process.kill()
        server.process.wait()
        limit = time.monotonic() + 30
        while _is_alive(pid):
            assert time.monotonic() < limit, "the engine's process outlived its front"
            time.sleep(0.02)


def _is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return not os.path.exists("/proc")


def test_what_cannot_be_served_ends_the_front_with_the_engines_own_sentence(tmp_path) -> None:
    with serving("/no/such/folder", "--engine-process", log=tmp_path / "log", is_awaited=False) as server:
        assert server.wait() == 1
        assert "There is no folder /no/such/folder" in server.output and "Traceback" not in server.output


def test_three_crashes_in_a_minute_end_it_with_the_cause(tmp_path) -> None:
    with serving("demo", "--engine-process", log=tmp_path / "log") as server:
        killed: set[int] = set()
        stop = threading.Event()

        def kill() -> None:
            while not stop.is_set() and server.process.poll() is None:
                try:
                    health = httpx.get(f"{server.url}/health", timeout=5)
                except httpx.HTTPError:
                    continue
                pid = health.json()["engine_process"]["pid"]
                if health.status_code == 200 and pid not in killed:
                    killed.add(pid)
                    os.kill(pid, signal.SIGKILL)

        thread = threading.Thread(target=kill)
        thread.start()
        try:
            assert server.wait() == 1
        finally:
            stop.set()
            thread.join()
        assert len(killed) == 3 and "crashed too often; last, it was ended by SIGKILL" in server.output
