"""What a reported run must say (the operator guide's evidence rule), judged and written down. Pure: no HTTP, no files.

An answer is judged twice: whether reasoning shows in its visible text, and whether it has the form that was asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import jsonschema

REASONING_MARKS = re.compile(
    r"</?think(ing)?>|</?reasoning>|\[/?THINK\]|<\|channel\|>|<\|?channel>|◁/?think▷|<\|START_THINKING\|>",
    re.IGNORECASE,
)
UNKNOWN = "unknown"
COLUMNS = ("run", "first token", "total", "tok/s", "prompt + completion (cached, reasoning)", "ended",
           "reasoning leak", "format")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Answer:
    """One measured answer. Times in seconds from the moment the request was sent."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    finish_reason: str | None = None
    first_s: float | None = None
    total_s: float = 0.0
    usage: Mapping[str, Any] = field(default_factory=dict)
    diagnostics: Mapping[str, Any] | None = None
    error: str | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """Speed of the decode, where there is more than one token to measure."""
        count = self.usage.get("completion_tokens") or 0
        if self.first_s is None or count < 2 or self.total_s <= self.first_s:
            return None
        return float((count - 1) / (self.total_s - self.first_s))


def leaked_reasoning(payload: Mapping[str, Any], answer: Answer) -> str | None:
    """How reasoning reached the reader who should not see it; None if it did not."""
    if mark := REASONING_MARKS.search(answer.text):
        return f"the visible text holds {mark.group()!r}"
    if payload.get("enable_thinking") is False and answer.reasoning:
        return "the request said not to think, and there is reasoning"
    return None


def format_fault(payload: Mapping[str, Any], answer: Answer) -> str | None:
    """Why the answer has not the form that the payload asks for: "" if it has, None if it asks for none."""
    wanted = payload.get("response_format") or {}
    if wanted.get("type") in ("json_object", "json_schema"):
        return _json_fault(answer, wanted)
    if payload.get("tools") and payload.get("tool_choice") not in (None, "auto", "none"):
        return _call_fault(answer)
    return None


def _json_fault(answer: Answer, wanted: Mapping[str, Any]) -> str:
    if answer.finish_reason == "length":
        return "the token limit came before the end of the document"
    try:
        document = json.loads(answer.text)
    except ValueError as error:
        return f"not JSON: {error}"
    schema = (wanted.get("json_schema") or {}).get("schema")
    if schema is None:
        return "" if isinstance(document, dict) else "not an object"
    try:
        jsonschema.validate(document, schema)
    except jsonschema.ValidationError as error:
        return f"does not fit the schema: {error.message}"
    return ""


def _call_fault(answer: Answer) -> str:
    if not answer.tool_calls:
        return "no tool was called"
    for call in answer.tool_calls:
        try:
            json.loads(call["function"]["arguments"])
        except ValueError as error:
            return f"the arguments of {call['function']['name']} are not JSON: {error}"
    return ""


def provisional_because(facts: Mapping[str, Any]) -> str | None:
    """Why the run cannot be tied to one checkout or install; None if it can."""
    install = str(facts.get("install", UNKNOWN))
    if install == UNKNOWN:
        return "the server does not say what it is"
    if "differ" in install:
        return "the checkout has local changes"
    if " at " not in install:
        return "the installation names no commit"
    return None


def record(facts: Mapping[str, Any], runs: Sequence[tuple[Mapping[str, Any], Answer]]) -> dict[str, Any]:
    """The whole record, as it goes into the JSON file."""
    return {
        **facts,
        "provisional": provisional_because(facts),
        "runs": [
            {
                "payload": payload,
                "answer": asdict(answer),
                "tokens_per_s": answer.tokens_per_s,
                "reasoning_leak": leaked_reasoning(payload, answer),
                "format_fault": format_fault(payload, answer),
            }
            for payload, answer in runs
        ],
    }


def markdown(made: Mapping[str, Any]) -> str:
    """The record for people."""
    rows = [
        ("model", f"`{made['model']}`, revision `{made['revision']}`"),
        ("serve command", f"`{made['command']}`"),
        ("settings in the environment", ", ".join(f"`{k}={v}`" for k, v in made["environment"].items()) or "none"),
        ("runner", f"`{made['interpreter']}`"),
        ("install", made["install"]),
        ("client", made["client"]),
        ("server", f"{made['url']}, version {made['version']}"),
        ("when", made["when"]),
        ("provisional", f"yes: {made['provisional']}" if made["provisional"] else "no"),
    ]
    lines = ["# Run record", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in rows]
    lines += [
        "",
        f"| {' | '.join(COLUMNS)} |",
        "| --- " * len(COLUMNS) + "|",
        *(_row(number, run) for number, run in enumerate(made["runs"], 1)),
    ]
    for number, run in enumerate(made["runs"], 1):
        payload = json.dumps(_shortened(run["payload"]), indent=2, ensure_ascii=False)
        lines += ["", f"## Run {number}", "", "```json", payload, "```", "", "Answer:", ""]
        text = run["answer"]["error"] or run["answer"]["text"] or json.dumps(run["answer"]["tool_calls"])
        lines += [f"    {line}" for line in text.splitlines() or [""]]
    return "\n".join(lines) + "\n"


def _row(number: int, run: Mapping[str, Any]) -> str:
    answer, usage = run["answer"], run["answer"]["usage"]
    if answer["error"]:
        return f"| {number} | | | | | error: {_cell(answer['error'])} | | |"
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", UNKNOWN)
    reasoning = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens", UNKNOWN)
    counts = f"{usage.get('prompt_tokens')} + {usage.get('completion_tokens')} ({cached}, {reasoning})"
    fault = run["format_fault"]
    form = "none asked" if fault is None else fault or "as asked"
    first = "" if answer["first_s"] is None else f"{1000 * answer['first_s']:.0f} ms"
    speed = "" if run["tokens_per_s"] is None else f"{run['tokens_per_s']:.1f}"
    cells = (number, first, f"{1000 * answer['total_s']:.0f} ms", speed, counts, answer["finish_reason"],
             run["reasoning_leak"] or "none", form)  # fmt: skip
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _shortened(value: Any) -> Any:
    """A payload without the megabytes of its pictures; the JSON file has them."""
    if isinstance(value, str) and len(value) > 400:
        return f"{value[:80]}… ({len(value)} characters)"
    if isinstance(value, Mapping):
        return {key: _shortened(item) for key, item in value.items()}
    return [_shortened(item) for item in value] if isinstance(value, list | tuple) else value
