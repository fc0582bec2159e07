"""Ask a random-weight model for documents of every schema of the official suite, 32 different ones in a batch.

    python -m tools.check_schemas                                     starts a server on the benchmark's smallest model
    python -m tools.check_schemas --url http://127.0.0.1:8000/v1      a server that runs already

Temperature 1.5, over HTTP. Each schema must give documents that another validator (`jsonschema`) accepts, or a 400 that
names the field and the keyword. Random weights would write strings of thousands of characters, so quotes, brackets and
commas get a bias; an answer that the token limit cut must say `length`, and is asked for again with a stronger one.
Ends with code 1 when a document is not valid or a number was missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import jsonschema

from vllm_mlx.bench import servers
from vllm_mlx.bench.main import default_folder
from vllm_mlx.bench.model import build
from vllm_mlx.generation.json_schema import subschemas

SUITE = Path(__file__).parent.parent / "tests" / "data" / "json_schema_suite" / "schemas.json"
VALIDATORS = {"draft2020-12": jsonschema.Draft202012Validator, "draft7": jsonschema.Draft7Validator}
CLOSERS = ('"', '",', '"}', '"]', "}", "]", ",", ":", '":')
BIASES = (4.0, 8.0, 14.0)


@dataclass
class Check:
    """One run. `problems` are sentences; empty means that all held."""

    url: str
    num_streams: int
    num_documents: int
    max_tokens: int
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    async def run(self, suite: list[dict[str, Any]]) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=600) as client:
            closers = await self._closers(client)
            todo = [(entry, seed) for seed in range(3) for entry in suite]
            refused: set[str] = set()
            it = iter(todo)

            async def stream() -> None:
                for entry, seed in it:
                    if self.counts["valid"] >= self.num_documents and seed:
                        return
                    if seed and entry["name"] + entry["draft"] in refused:
                        continue
                    if not await self._ask(client, entry, seed, closers):
                        refused.add(entry["name"] + entry["draft"])

            await asyncio.gather(*(stream() for _ in range(self.num_streams)))

    async def _closers(self, client: httpx.AsyncClient) -> list[int]:
        """Tokens of the model that end strings, objects and arrays."""
        root = self.url.removesuffix("/v1")
        found = set()
        for text in CLOSERS:
            tokens = (await client.post(f"{root}/tokenize", json={"prompt": text})).json()["tokens"]
            found |= set(tokens[-1:])
        return sorted(found)

    async def _ask(self, client: httpx.AsyncClient, entry: dict[str, Any], seed: int, closers: list[int]) -> bool:
        """Whether the schema is served."""
        shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": entry["schema"], "strict": True}}
        for bias in BIASES:
            body = {
                "model": "default", "messages": [{"role": "user", "content": "A document, please."}], "seed": seed,
                "temperature": 1.5, "max_tokens": self.max_tokens, "response_format": shape, "top_p": 1.0,
                "logit_bias": {str(i): bias for i in closers},
            }  # fmt: skip
            response = await client.post("/chat/completions", json=body)
            if response.status_code == 400:
                self._refused(entry, response.json()["error"])
                return False
            if response.status_code != 200:
                self._problem(entry, f"status {response.status_code}: {response.text[:200]}")
                return True
            choice = response.json()["choices"][0]
            if choice["finish_reason"] == "stop":
                self._document(entry, choice["message"]["content"])
                return True
            if choice["finish_reason"] != "length":
                self._problem(entry, f"finish_reason {choice['finish_reason']!r}")
                return True
            self.counts["cut by the token limit, asked again"] += 1
        self.counts["never came to an end"] += 1
        return True

    def _refused(self, entry: dict[str, Any], error: dict[str, Any]) -> None:
        self.counts["refused"] += 1
        self.counts[f"refused: {error['code']}"] += 1
        if not str(error["param"]).startswith("response_format.json_schema"):
            self._problem(entry, f"a 400 that does not name the field: {error}")
        elif not any(f"'{keyword}'" in error["message"] for keyword in keywords_of(entry["schema"])):
            self._problem(entry, f"a 400 that does not name the keyword: {error}")

    def _document(self, entry: dict[str, Any], text: str | None) -> None:
        try:
            document = json.loads(text or "")
        except ValueError:
            self.counts["not JSON"] += 1
            self._problem(entry, f"not JSON: {text!r}")
            return
        # A schema that does not say its draft is read as 2020-12, where what stands beside `$ref` counts.
        draft = "draft2020-12" if has_siblings_of_ref(entry["schema"]) else entry["draft"]
        is_valid = VALIDATORS[draft](entry["schema"]).is_valid(document)
        self.counts["valid" if is_valid else "invalid"] += 1
        if not is_valid:
            self._problem(entry, f"invalid: {text}")

    def _problem(self, entry: dict[str, Any], text: str) -> None:
        self.problems.append(f"{entry['draft']} {entry['name']}: {text}")


def keywords_of(schema: Any) -> set[str]:
    return set(schema) | {keyword for _, _, child in subschemas(schema) for keyword in keywords_of(child)}


def has_siblings_of_ref(schema: Any) -> bool:
    if "$schema" in schema:
        return False
    return ("$ref" in schema and len(schema) > 1) or any(has_siblings_of_ref(s) for _, _, s in subschemas(schema))


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--documents", type=int, default=500, help="valid documents to gather")
    parser.add_argument("--max-tokens", type=int, default=300)
    options = parser.parse_args()
    suite = [entry for entry in json.loads(SUITE.read_text(encoding="utf-8")) if isinstance(entry["schema"], dict)]
    async with AsyncExitStack() as stack:
        url = options.url
        if url is None:
            port = servers.free_port()
            command = servers.ours(str(build(default_folder(), "5m")), port)
            endpoint, _ = await stack.enter_async_context(servers.running(command, port, "default"))
            url = endpoint.url
        check = Check(url, options.streams, options.documents, options.max_tokens)
        await check.run(suite)
    print(f"{len(suite)} schemas, {options.streams} at a time")
    for name, count in sorted(check.counts.items()):
        print(f"{count:6d}  {name}")
    for problem in check.problems[:20]:
        print(problem)
    is_good = not check.problems and check.counts["valid"] >= options.documents
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
