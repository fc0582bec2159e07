"""deploy/litellm/config.yaml in a real LiteLLM proxy before two real servers: `python -m tools.litellm_check LITELLM`.

LITELLM is the program of an environment of its own (`pip install 'litellm[proxy]'`; it would mix badly with ours).
Serves the built-in model twice, asks through the proxy, drains one server in the middle of a stream, and says what
held. Exit code 1 if something did not. Run by hand: the proxy is large, and is no dependency of ours.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
import uuid
from contextlib import ExitStack
from pathlib import Path

import httpx

from tests.serving.process import ServerProcess, free_port, serving

CONFIG = Path(__file__).parents[1] / "deploy/litellm/config.yaml"
KEY = f"sk-{uuid.uuid4().hex}{uuid.uuid4().hex}"
START_LIMIT_S = 180.0


class Check:
    """What held so far, printed as it is seen."""

    def __init__(self) -> None:
        self.failed = 0

    def that(self, what: str, holds: bool, detail: object = "") -> None:
        self.failed += not holds
        print(f"{'holds ' if holds else 'FAILED'}  {what} {detail}", flush=True)


def start_proxy(program: str, folder: Path, servers: list[ServerProcess]) -> tuple[subprocess.Popen[bytes], str]:
    text = CONFIG.read_text()
    for number, server in enumerate(servers, 1):
        text = text.replace(f"127.0.0.1:800{number}/", f"127.0.0.1:{server.port}/")
    (folder / "config.yaml").write_text(text)
    port = free_port()
    command = [program, "--config", str(folder / "config.yaml"), "--host", "127.0.0.1", "--port", str(port)]
    # LiteLLM reads prices from the network at start; the file it brings along will do.
    secrets = {"VLLM_MLX_API_KEY": "none", "LITELLM_MASTER_KEY": KEY}
    environment = {**os.environ, **secrets, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    with (folder / "litellm.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    url = f"http://127.0.0.1:{port}"
    limit = time.monotonic() + START_LIMIT_S
    while time.monotonic() < limit and process.poll() is None:
        try:
            if httpx.get(f"{url}/health/liveliness", timeout=5).status_code == 200:
                return process, url
        except httpx.TransportError:
            time.sleep(0.2)
    process.kill()
    raise SystemExit("LiteLLM did not start:\n" + (folder / "litellm.log").read_text()[-3000:])


def headers_of(session: str) -> dict[str, str]:
    return {"x-session-id": session, "authorization": f"Bearer {KEY}"}


def ask(url: str, session: str, content: str, **fields: object) -> httpx.Response:
    body = {"model": "local", "messages": [{"role": "user", "content": content}], "max_tokens": 4, "temperature": 0}
    return httpx.post(f"{url}/v1/chat/completions", json={**body, **fields}, headers=headers_of(session), timeout=120)


def check(url: str, servers: list[ServerProcess], held: Check) -> None:
    places: dict[str, list[str]] = {}
    cached = []
    for number in range(12):
        session = str(uuid.uuid4())
        story = f"Tale {number}: " + "once upon a time there was a server. " * 8
        answers = [ask(url, session, story) for _ in range(2)]
        places[session] = [answer.headers.get("x-litellm-model-id", str(answer.status_code)) for answer in answers]
        cached.append(answers[1].json()["usage"]["prompt_tokens_details"]["cached_tokens"])
    held.that("a conversation stays with its replica", all(len(set(p)) == 1 for p in places.values()))
    held.that("its prefix is found there", min(cached) > 0, f"(cached tokens {cached})")
    firsts = sorted(place[0] for place in places.values())
    held.that("conversations are spread", len(set(firsts)) == 2, firsts)

    session = next(s for s, p in places.items() if p[0] == "replica-1")
    fields = {"stream": True, "max_tokens": 1000, "ignore_eos": True}
    body = {"model": "local", "messages": [{"role": "user", "content": "Count"}], "temperature": 0, **fields}
    headers = headers_of(session)
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers, timeout=120) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: "))
        next(lines)
        servers[0].signal()
        while httpx.get(f"{servers[0].url}/health/ready").status_code == 200:
            pass
        moved = ask(url, session, "and now?")
        held.that(
            "a conversation whose replica drains goes on at the other",
            moved.status_code == 200 and moved.headers.get("x-litellm-model-id") == "replica-2",
            moved.status_code if moved.status_code != 200 else moved.headers.get("x-litellm-model-id"),
        )
        rest = list(lines)
    pieces = [json.loads(line[6:]) for line in rest if line != "data: [DONE]"]
    reason = pieces[-1]["choices"][0]["finish_reason"]
    held.that("its stream comes to its end", rest[-1] == "data: [DONE]" and reason == "length", f"({reason})")
    servers[0].wait()
    codes = [ask(url, str(uuid.uuid4()), "x").status_code for _ in range(8)]
    held.that("with one replica gone nobody notices", set(codes) == {200}, codes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("litellm", help="the program `litellm` of an environment that has it")
    options = parser.parse_args()
    held = Check()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder, flags = Path(name), ("--repetition-policy", "off")
        servers = [stack.enter_context(serving("demo", *flags, log=folder / f"{i}", is_awaited=False)) for i in (1, 2)]
        proxy, url = start_proxy(options.litellm, folder, servers)
        try:
            for server in servers:
                server.wait_until_healthy()
            check(url, servers, held)
        finally:
            proxy.terminate()
            proxy.wait(timeout=60)
            if held.failed:
                print((folder / "litellm.log").read_text()[-4000:])
    return 1 if held.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
