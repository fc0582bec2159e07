"""The `instructor` package against a server on the built-in model: typed answers by tools, by schema, and streamed.

    make instructor

It asks for older versions of rich and jiter than the rest of ours can use, so it has an environment of its own and is
no part of `make test`. Run with that environment's Python; the server's is given by --server-python.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import time
import urllib.request
from typing import Literal

import instructor
import openai
from pydantic import BaseModel


class Report(BaseModel):
    city: Literal["Paris", "Oslo"]
    is_warm: bool


def check(url: str) -> list[str]:
    """Sentences about what failed; empty when all is well."""
    problems = []
    messages = [{"role": "user", "content": "Paris is warm"}]
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA, instructor.Mode.RESPONSES_TOOLS):
        plain = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        client = instructor.from_openai(plain, mode=mode)
        limit = "max_output_tokens" if mode is instructor.Mode.RESPONSES_TOOLS else "max_tokens"
        options = {"model": "default", "temperature": 0, "max_retries": 0, limit: 100}
        try:
            report = client.create(response_model=Report, messages=messages, **options)
            if not isinstance(report, Report):
                problems.append(f"{mode}: {report!r} is no Report.")
            if mode is not instructor.Mode.RESPONSES_TOOLS:
                last = list(client.create_partial(response_model=Report, messages=messages, **options))[-1]
                if last.model_dump() != report.model_dump():
                    problems.append(f"{mode}: streamed {last!r}, whole {report!r}.")
        except Exception as error:  # whatever it raises is the finding
            problems.append(f"{mode}: {type(error).__name__}: {str(error)[:300]}")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server-python", default=sys.executable)
    given = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen([given.server_python, "-m", "vllm_mlx", "serve", "demo", "--port", str(port)])
    try:
        until = time.monotonic() + 120
        while time.monotonic() < until:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        problems = check(url)
    finally:
        server.terminate()
        server.wait(30)
    print("\n".join(problems) or "instructor: all well.")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
