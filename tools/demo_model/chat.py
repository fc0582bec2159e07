"""One training or evaluation case, and how it becomes text through the shipped chat template."""

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL.Image import Image

TEMPLATE = Path(__file__).with_name("chat_template.jinja")
END = "<|im_end|>"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


@dataclass(frozen=True)
class Check:
    """What a right answer looks like. `kind` names a function in `checks.py`."""

    kind: str
    want: Any = None


@dataclass(frozen=True)
class Sample:
    skill: str
    messages: list[dict[str, Any]]
    reply: str
    check: Check
    tools: list[dict[str, Any]] | None = None
    thinking: bool | None = None
    images: list[Image] = field(default_factory=list)
    spelled: str = ""  # the part of the reply that is learned letter by letter
    begun: str = ""  # what the model is said to have written already, which is not learned


def user(text: str, images: int = 0) -> dict[str, Any]:
    if not images:
        return {"role": "user", "content": text}
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def call_text(name: str, arguments: dict[str, Any]) -> str:
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


@cache
def template() -> Any:
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    env.filters["tojson"] = lambda x, **_: json.dumps(x, ensure_ascii=False)  # as transformers does: no HTML escapes
    return env.from_string(TEMPLATE.read_text())


def prompt(sample: Sample) -> str:
    flags = {} if sample.thinking is None else {"enable_thinking": sample.thinking}
    return template().render(messages=sample.messages, tools=sample.tools, add_generation_prompt=True, **flags)
