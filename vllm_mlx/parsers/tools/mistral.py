"""Mistral, old and new.

[TOOL_CALLS][{"name": "f", "arguments": {...}}]             v2, v3 (7B, Nemo, Small 2409); ids may stand in the objects
[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{...}                  v11 (Small 3.2)
[TOOL_CALLS]f[ARGS]{...}[TOOL_CALLS]g[ARGS]{...}            v13 (Magistral, Devstral, Ministral 3)
[TOOL_CALLS]f{...}                                          what remains when control tokens are dropped
"""

from __future__ import annotations

import re

from vllm_mlx.parsers.json_calls import read_json_calls, read_named_call
from vllm_mlx.parsers.machine import Broken, Steps
from vllm_mlx.parsers.signs import Sign
from vllm_mlx.parsers.tool_parser import Envelope, ToolFormat, ToolParser

_NAME = re.compile(r"\s*[\w.:-]+\s*\Z")


class Mistral(ToolFormat):
    name = "mistral"
    aliases: tuple[str, ...] = ("mistral_v11", "mistral_v13", "ministral", "devstral", "magistral")
    openers: tuple[str, ...] = ("[TOOL_CALLS]",)
    markers: tuple[str, ...] = ("[ARGS]", "[CALL_ID]")
    needs_special_tokens = True
    signs: tuple[Sign, ...] = (Sign("[TOOL_CALLS]", "[ARGS]"), Sign(tokens=("[TOOL_CALLS]", "[ARGS]")))
    envelope = Envelope(
        begin="[TOOL_CALLS]",
        middle="[ARGS]",
        end="",
        triggers=("[TOOL_CALLS]",),
        special_tokens=("[TOOL_CALLS]", "[ARGS]"),
    )

    def read(self, p: ToolParser, opener: str) -> Steps[None]:
        yield from p.skip_space()
        if (yield from p.peek()) in ("[", "{"):
            yield from read_json_calls(p)
            return
        while True:
            yield from _read_named(p)
            # Some write the next call without its marker.
            yield from p.skip_space()
            if (yield from p.looking_at(*(f"{name}[ARGS]" for name in p.tools), "[ARGS]")) in (None, "[ARGS]"):
                return


def _read_named(p: ToolParser) -> Steps[None]:
    name, end = yield from p.collect_until("[ARGS]", "[CALL_ID]", "{", limit=256)
    if not _NAME.match(name):
        raise Broken(f"{name[:40]!r} is not a tool's name")
    id = None
    if end == "[CALL_ID]":
        id, _ = yield from p.collect_until("[ARGS]", limit=256)
    elif end == "{":
        p.unread(end)
    yield from read_named_call(p, name, id)


FORMAT = Mistral()
