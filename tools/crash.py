"""Kill the engine's process at random while clients ask: `python -m tools.crash [--kills 50] [--clients 8]`.

Starts `vllm-mlx serve demo --engine-process` on a free port. Every answer must be the right one, a 503 that says why,
or a stream that ends with an error event; the front's `/health` must answer throughout, and the engine must be there
again within the time of its first start plus two seconds. Prints counts, recovery times and a verdict; exit code 1 if
one of these did not hold. Kills are spaced so that the front does not give up (three crashes in a minute): fifty take
26 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter

import httpx

SPACING_S = 31.0
GRACE_S = 2.0


class Run:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        port = self.url.rsplit(":", 1)[1]
        command = [sys.executable, "-m", "vllm_mlx.cli", "serve", options.model, "--engine-process", "--port", port]
        self.process = subprocess.Popen([*command, "--log-level", "error"], stdout=subprocess.DEVNULL)
        self.counts: Counter[str] = Counter()
        self.recoveries: list[float] = []
        self.is_over = threading.Event()

    def health(self) -> httpx.Response:
        return httpx.get(f"{self.url}/health", timeout=5)

    def wait_until_ready(self) -> None:
        while True:
            try:
                if self.health().status_code == 200:
                    return
            except httpx.HTTPError:
                assert self.process.poll() is None, "the front ended"
            time.sleep(0.02)

    def client(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self.is_over.is_set():
            body = {"messages": [{"role": "user", "content": "Reply with pong"}],
                    "max_tokens": 24, "temperature": 0, "stream": rng.random() < 0.5}  # fmt: skip
            try:
                response = httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=120)
            except httpx.HTTPError as error:
                self.counts[f"MISSING {type(error).__name__}"] += 1
                continue
            if response.status_code != 200:
                self.counts[f"refused with {response.status_code}"] += 1
            elif "ended while it generated" in response.text:
                self.counts["ended with an error event"] += 1
            elif body["stream"] and not response.text.endswith("data: [DONE]\n\n"):
                self.counts["MISSING end of stream"] += 1
            else:
                is_right = "pong" in _text(response, bool(body["stream"])).lower()
                self.counts["answered" if is_right else "WRONG answer"] += 1

    def watch(self) -> None:
        while not self.is_over.is_set():
            try:
                self.health()
                self.counts["health answered"] += 1
            except httpx.HTTPError:
                self.counts["MISSING health"] += 1
            time.sleep(0.1)

    def kill(self) -> None:
        for number in range(self.options.kills):
            time.sleep(random.Random(number).uniform(0.2, 3.0))
            pid = self.health().json()["engine_process"]["pid"]
            os.kill(pid, signal.SIGKILL)
            start = time.monotonic()
            while (answer := self.health()).status_code != 200 or answer.json()["engine_process"]["pid"] == pid:
                time.sleep(0.02)
            self.recoveries.append(time.monotonic() - start)
            time.sleep(max(0.0, SPACING_S - (time.monotonic() - start)) if number + 1 < self.options.kills else 0)


def _text(response: httpx.Response, is_stream: bool) -> str:
    if not is_stream:
        return str(response.json()["choices"][0]["message"]["content"])
    chunks = [json.loads(line[6:]) for line in response.text.split("\n") if line.startswith("data: {")]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--model", default="demo")
    run = Run(parser.parse_args())
    try:
        start = time.monotonic()
        run.wait_until_ready()
        load_s = time.monotonic() - start
        threads = [threading.Thread(target=run.client, args=(i,)) for i in range(run.options.clients)]
        threads.append(threading.Thread(target=run.watch))
        for thread in threads:
            thread.start()
        run.kill()
        run.is_over.set()
        for thread in threads:
            thread.join()
    finally:
        run.process.terminate()
        run.process.wait(timeout=60)
    for what, count in sorted(run.counts.items()):
        print(f"{count:6d}  {what}")
    longest = max(run.recoveries)
    print(f"start {load_s:.1f} s; recovery median {statistics.median(run.recoveries):.1f} s, "
          f"longest {longest:.1f} s over {len(run.recoveries)} kills")  # fmt: skip
    faults = [what for what in run.counts if what.startswith(("MISSING", "WRONG"))]
    if longest > load_s + GRACE_S:
        faults.append(f"a recovery of {longest:.1f} s, more than the start's {load_s:.1f} s and {GRACE_S:g} s")
    print(f"verdict: {'; '.join(faults) or 'nothing wrong, nothing missing, the front was up throughout'}")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
