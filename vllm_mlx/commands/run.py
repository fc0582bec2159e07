"""`vllm-mlx run "prompt"`: one answer on standard output, all else on standard error, so that it fits in a pipe."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from contextlib import aclosing
from pathlib import Path
from typing import Any, TextIO

from vllm_mlx.commands.talk import Numbers, Partner, TalkError, find_partner, user_message
from vllm_mlx.options import UsageError

FIELDS = ("temperature", "top_p", "max_tokens", "frequency_penalty", "seed")


def run(parsed: argparse.Namespace) -> int:
    prompt = read_prompt(parsed.prompt, sys.stdin)
    body = make_body(parsed, prompt)
    return asyncio.run(_run(parsed, body))


async def _run(parsed: argparse.Namespace, body: dict[str, Any]) -> int:
    key = parsed.api_key or os.environ.get("VLLM_MLX_CLIENT_API_KEY")
    partner = await find_partner(parsed.model, parsed.server, key)
    try:
        numbers = await write_answer(partner, body, sys.stdout)
    finally:
        await partner.close()
    if parsed.stats:
        print(f"{partner.name}: {numbers}", file=sys.stderr)
    return 0


async def write_answer(partner: Partner, body: dict[str, Any], out: TextIO) -> Numbers | None:
    """The answer without its reasoning, as it comes; ends with a new line."""
    numbers, last = None, "\n"
    async with aclosing(partner.answer(body)) as pieces:
        async for piece in pieces:
            if isinstance(piece, Numbers):
                numbers = piece
            elif not piece.is_reasoning:
                out.write(piece.text)
                out.flush()
                last = piece.text[-1]
    if last != "\n":
        out.write("\n")
        out.flush()
    return numbers


def read_prompt(given: str | None, stdin: TextIO) -> str:
    """The argument, then what is piped in."""
    piped = "" if stdin.isatty() else stdin.read()
    parts = [part for part in (None if given == "-" else given, piped.strip("\n")) if part]
    if not parts:
        raise UsageError("there is no prompt; give it as an argument, or pipe it in.")
    return "\n\n".join(parts)


def make_body(parsed: argparse.Namespace, prompt: str) -> dict[str, Any]:
    messages = [{"role": "system", "content": parsed.system}] if parsed.system else []
    body: dict[str, Any] = {"messages": [*messages, user_message(prompt, parsed.image)], **sampling(parsed)}
    if parsed.json_schema:
        try:
            schema = json.loads(Path(parsed.json_schema).read_text(encoding="utf-8"))
        except OSError as error:
            raise TalkError(f"The schema {parsed.json_schema} cannot be read ({error.strerror}).") from None
        except ValueError as error:
            raise TalkError(f"The schema {parsed.json_schema} is not JSON: {error}.") from None
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    return body


def sampling(parsed: argparse.Namespace) -> dict[str, Any]:
    """The request fields of the flags that were given; raises UsageError where the server would refuse a value."""
    fields = {name: value for name in FIELDS if (value := getattr(parsed, name)) is not None}
    if fields:
        _check(fields)
    return fields if parsed.think is None else {**fields, "enable_thinking": parsed.think}


def _check(fields: dict[str, Any]) -> None:
    # Only those wait for these imports who give a flag.
    from pydantic import ValidationError

    from vllm_mlx.api.openai.schemas import ChatCompletionRequest

    try:
        ChatCompletionRequest.model_validate({"messages": [], **fields})
    except ValidationError as error:
        first = error.errors()[0]
        name, reason = str(first["loc"][0]), first["msg"]
        flag = f"--{name.replace('_', '-')}"
        raise UsageError(f"{flag} {fields[name]}: {reason[:1].lower()}{reason[1:]}.") from None
