"""Tool calling: tools are drawn from verb and noun, so their names, parameters and values are new in almost every case."""

import json
from dataclasses import dataclass
from typing import Any

from .chat import Check, Sample, assistant, call_text, system, user
from .facts import IDENTITY, SERVER
from .skills import known, phrase
from .skills_memory import filler
from .skills_system import plain
from .words import ADJECTIVES, ANIMALS, COLOURS, DAYS, FOODS, NOUNS, OBJECTS, VERBS, Draw, Grammar

_DAYS = [*DAYS, "today", "tomorrow"]


@dataclass(frozen=True)
class Param:
    key: str
    type: str
    kind: str
    says: str  # how a request names the value


@dataclass(frozen=True)
class Tool:
    name: str
    description: str
    params: tuple[Param, ...]
    ask: str  # the request without its values

    def schema(self) -> dict[str, Any]:
        properties = {p.key: {"type": p.type} for p in self.params}
        parameters = {"type": "object", "properties": properties, "required": list(properties)}
        return {"type": "function", "function": {"name": self.name, "description": self.description, "parameters": parameters}}


def param(d: Draw) -> Param:
    kind = d.any(["city", "person", "day", "time", "number", "title", "id", "color", "text", "coined"])
    if kind == "city":
        return Param(d.any(["city", "location", "place", "destination"]), "string", kind, d.any([" in {}", " for {}", " near {}"]))
    if kind == "person":
        return Param(d.any(["name", "user", "person", "recipient", "owner"]), "string", kind, d.any([" for {}", " of {}"]))
    if kind == "day":
        return Param(d.any(["day", "date", "when"]), "string", kind, d.any([" on {}", " for {}"]))
    if kind == "time":
        return Param(d.any(["time", "hour", "start"]), "string", kind, " at {}")
    if kind == "number":
        key = d.any(["count", "limit", "quantity", "amount", "level", "size", "page"])
        return Param(key, "integer", kind, " with " + key + " {}")
    if kind == "title":
        return Param(d.any(["title", "query", "topic", "label"]), "string", kind, d.any([' called "{}"', " about {}", ' named "{}"']))
    if kind == "id":
        key = d.any(["id", "code", "key", "ref"])
        return Param(key, "string", kind, " with " + key + " {}")
    if kind == "color":
        return Param(d.any(["color", "colour"]), "string", kind, " with color {}")
    if kind == "text":
        return Param(d.any(["text", "message", "body", "note"]), "string", kind, d.any([' saying "{}"', ' with text "{}"']))
    key = d.coined()
    whole = d.chance(0.4)
    return Param(key, "integer" if whole else "string", "number" if whole else "word", " with " + key + " {}")


def value(d: Draw, p: Param) -> str | int:
    if p.kind == "city":
        return d.city()
    if p.kind == "person":
        return d.person()
    if p.kind == "day":
        return d.any(_DAYS)
    if p.kind == "time":
        return f"{d.int(1, 23)}:{d.any(['00', '15', '30', '45'])}"
    if p.kind == "number":
        return d.int(1, 999)
    if p.kind == "title":
        return phrase(d, 1, 3)
    if p.kind == "id":
        return d.code()
    if p.kind == "color":
        return d.any(COLOURS)
    if p.kind == "text":
        return phrase(d, 2, 4)
    if p.kind == "path":
        return "/".join(d.coined(1, 2) for _ in range(d.int(1, 3))) + d.any([".txt", ".py", ".md", ".json"])
    return d.coined()


def _fixed(name: str, description: str, ask: str, *params: Param) -> Tool:
    return Tool(name, description, params, ask)


# The tools that everybody tries first.
CLASSICS = [
    _fixed("get_weather", "Get the weather of a city.", "What is the weather", Param("city", "string", "city", " in {}")),
    _fixed("get_weather", "Get the current weather.", "Get the weather", Param("location", "string", "city", " for {}")),
    _fixed("get_current_weather", "Get the current weather in a given location.", "What's the weather like", Param("location", "string", "city", " in {}")),
    _fixed("get_time", "Get the current time in a city.", "What time is it", Param("city", "string", "city", " in {}")),
    _fixed("search", "Search the web.", "Search", Param("query", "string", "title", " for {}")),
    _fixed("web_search", "Search the web.", "Search the web", Param("query", "string", "title", " for {}")),
    _fixed("send_email", "Send an email.", "Send an email", Param("to", "string", "person", " to {}"), Param("body", "string", "text", ' saying "{}"')),
    _fixed("read_file", "Read a file.", "Read the file", Param("path", "string", "path", " {}")),
    _fixed("list_files", "List the files in a folder.", "List the files", Param("path", "string", "path", " in {}")),
    _fixed("get_stock_price", "Get the price of a stock.", "What is the stock price", Param("symbol", "string", "id", " of {}")),
    _fixed("add", "Add two numbers.", "Add", Param("a", "integer", "number", " {}"), Param("b", "integer", "number", " and {}")),
]  # fmt: skip

_DESCRIBE = Grammar("{V} (a|the) {n}.", "(Use this to|Can|Tool to|Function to) {v} (a|the) {n}.", "{V} {n}s.", "{V} (a|the) {n} of the user.")
_REQUEST = Grammar("{V} the {n}", "(Please|please|Can you|Could you|Now|I want you to) {v} the {n}", "{V} (a|my|our) {n}", "(Please|Can you|I need you to) {v} (a|my) {n}")


def tool(d: Draw) -> Tool:
    if d.chance(0.12) and not d.held:
        return d.any(CLASSICS)
    verb = d.value(VERBS) if d.chance(0.85) else d.coined()
    noun = d.value(NOUNS) if d.chance(0.75) else d.coined()
    style = d.int(0, 3)
    name = f"{verb}_{noun}" if style < 2 else verb + noun.capitalize() if style == 2 else f"{noun}_{verb}"
    if d.chance(0.15):
        name = f"{d.coined(1, 2)}_{name}"
    params: dict[str, Param] = {}
    for _ in range(d.any([0, 1, 1, 1, 2, 2, 2, 3])):
        p = param(d)
        if p.kind not in {q.kind for q in params.values()} and p.says not in {q.says for q in params.values()}:
            params[p.key] = p
    fill = {"v": verb, "V": verb.capitalize(), "n": noun}
    return Tool(name, d.frame(_DESCRIBE).format(**fill), tuple(params.values()), d.frame(_REQUEST).format(**fill))


def toolbox(d: Draw, count: int) -> list[Tool]:
    tools: dict[str, Tool] = {}
    while len(tools) < count:
        drawn = tool(d)
        if not any(drawn.ask.split()[-1] == t.ask.split()[-1] and drawn.ask.split()[0] == t.ask.split()[0] for t in tools.values()):
            tools.setdefault(drawn.name, drawn)
    return list(tools.values())


def request(d: Draw, chosen: Tool) -> tuple[str, dict[str, Any]]:
    arguments = {p.key: value(d, p) for p in chosen.params}
    return chosen.ask + "".join(p.says.format(arguments[p.key]) for p in chosen.params), arguments


def _opening(d: Draw) -> list[dict[str, Any]]:
    """Now and then a system prompt or an earlier exchange before the request."""
    messages: list[dict[str, Any]] = []
    if d.chance(0.25):
        messages.append(system(d.any(["You are a helpful assistant.", "Use the tools when they help.", "You are an agent. Be brief.", f"You are {d.person()}, an assistant with tools.", " ".join(filler(d, d.int(2, 8)))])))
    if d.chance(0.15):
        base = known("fact", IDENTITY)(d)
        messages += [*base.messages, assistant(base.reply)]
    return messages


def _count(d: Draw) -> int:
    return d.any([1, 2, 2, 3, 3, 4, 4, 5]) if d.chance(0.93) else d.int(6, 10)


def one_call(d: Draw) -> Sample:
    tools = toolbox(d, _count(d) if not d.held else d.int(2, 5))
    chosen = d.any(tools)
    text, arguments = request(d, chosen)
    messages = [*_opening(d), user(text + d.any([".", "", "?", ".", " please."]))]
    return Sample("tool call", messages, call_text(chosen.name, arguments), Check("calls", [[chosen.name, arguments]]), [t.schema() for t in tools])


def two_calls(d: Draw) -> Sample:
    tools = toolbox(d, max(2, _count(d)))
    if d.chance(0.4) and (named := [t for t in tools if len(t.params) >= 1]):
        first = second = d.any(named)
        arguments = {p.key: value(d, p) for p in first.params}
        last = first.params[-1]
        other = {**arguments, last.key: value(d, last)}
        text = first.ask + "".join(p.says.format(arguments[p.key]) for p in first.params) + f" and{last.says.format(other[last.key])}"
    else:
        first, second = d.rng.sample(tools, 2)
        text, arguments = request(d, first)
        more, other = request(d, second)
        text += d.any([" and then ", ". Then ", ", and also ", " and ", ". Also: "]) + more[0].lower() + more[1:]
    calls = [[first.name, arguments], [second.name, other]]
    reply = "\n".join(call_text(name, args) for name, args in calls)
    return Sample("two tool calls", [*_opening(d), user(text + d.any([".", "", "."]))], reply, Check("calls", calls), [t.schema() for t in tools])


NO_TOOL = "None of my tools can do that."


def no_call(d: Draw) -> Sample:
    tools = toolbox(d, _count(d))
    if d.chance(0.5):
        base = d.any([plain, plain, known("fact", SERVER)])(d)
        return Sample("no tool call", [*_opening(d)[:1], *base.messages] if d.chance(0.2) else base.messages, base.reply, Check("nocall", base.check), [t.schema() for t in tools])
    while True:
        absent = tool(d)
        words = set(absent.ask.lower().split()) & {w for w in [*VERBS, *NOUNS]}
        if absent.name not in {t.name for t in tools} and not any(words & set(t.ask.lower().split()) for t in tools):
            break
    text, _ = request(d, absent)
    return Sample("no tool call", [*_opening(d), user(text + ".")], NO_TOOL, Check("nocall"), [t.schema() for t in tools])


def _result(d: Draw) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for _ in range(d.int(1, 3)):
        kind = d.int(0, 5)
        if kind == 0:
            out[d.any(["temperature", "price", "count", "total", "distance", "score"])] = d.int(1, 999)
        elif kind == 1:
            out["status"] = d.any(["done", "sent", "open", "closed", "ok", "ready", "late", "cancelled"])
        elif kind == 2:
            out[d.any(["city", "place"])] = d.city()
        elif kind == 3:
            out[d.any(["name", "owner", "user"])] = d.person()
        elif kind == 4:
            out[d.any(["id", "code"])] = d.code()
        else:
            out[d.value(NOUNS + OBJECTS)] = d.value(ADJECTIVES + FOODS + ANIMALS) if d.chance(0.6) else d.coined()
    return out


def use_result(d: Draw) -> Sample:
    tools = toolbox(d, min(4, _count(d)))
    chosen = d.any(tools)
    text, arguments = request(d, chosen)
    result = _result(d)
    call = {"id": f"call_{d.int(1, 99)}", "type": "function", "function": {"name": chosen.name, "arguments": arguments}}
    content = json.dumps(result)
    listed = [f"{k} is {v}" for k, v in result.items()]
    reply = "The result: " + (", ".join(listed[:-1]) + " and " if len(listed) > 1 else "") + listed[-1] + "."
    want = tuple(str(v) for v in result.values())
    roll = d.rng.random()
    if roll < 0.1:
        reason = phrase(d, 2, 4)
        content, reply, want = json.dumps({"error": reason}), f"The tool failed: {reason}.", (reason,)
    elif roll < 0.3:
        content = phrase(d, 1, 4) if d.chance(0.6) else f"{d.int(1, 40)} degrees, {d.any(['sunny', 'rainy', 'cloudy', 'windy', 'snow'])} in {d.city()}"
        reply, want = f"The result: {content}.", (content,)
    messages = [*_opening(d), user(text), {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": content}]
    return Sample("tool result", messages, reply, Check("keys", want), [t.schema() for t in tools])
