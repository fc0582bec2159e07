"""Requests made by schemathesis from our own OpenAPI document, against a server on the built-in model.

    python -m tools.fuzz_openapi --minutes 5

Fails when an answer is a 500 (or any server error that the document does not know), has a status or a content type that
is not documented, or a body that does not fit its schema. `tools/fuzz.py` is about what comes after a body is valid.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vllm_mlx.bench import servers

CHECKS = "status_code_conformance,content_type_conformance,response_schema_conformance"
# Short answers, and none for long: what is tried here is the door.
FLAGS = ("--max-tokens", "8", "--timeout", "10", "--repetition-policy", "off")


async def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz_openapi", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--log", type=Path, help="where the server writes; otherwise a temporary file")
    given = parser.parse_args(arguments)
    port = servers.free_port()
    with tempfile.TemporaryDirectory() as folder:
        log = given.log or Path(folder) / "server.log"
        async with servers.running(servers.ours("demo", port, FLAGS), port, "default", log=log):
            command = [
                sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{port}/openapi.json",
                "--checks", CHECKS, "--max-time", str(int(given.minutes * 60)), "--continue-on-failure",
                "--phases", "examples,coverage,fuzzing", "--request-timeout", "60", "--generation-database", "none",
                # An endless stream by design.
                "--exclude-path", "/v1/dashboard",
                "--warnings", "off", "--suppress-health-check", "all", "--no-color",
                *(["--seed", str(given.seed)] if given.seed is not None else []),
            ]  # fmt: skip
            process = await asyncio.create_subprocess_exec(*command, cwd=folder)
            code = await process.wait()
        failures = [line for line in log.read_text(errors="replace").splitlines() if "Traceback" in line]
    if failures:
        print(f"The server's log holds {len(failures)} tracebacks.")
    return 1 if failures else code


if __name__ == "__main__":
    raise SystemExit(asyncio.run(main(sys.argv[1:])))
