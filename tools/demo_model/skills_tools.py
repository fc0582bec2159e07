"""Tool calling: tools are drawn from verb and noun, so their names, parameters and values are new in almost every case."""

import json
from dataclasses import dataclass, replace
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
    choices: tuple[str, ...] = ()
    optional: bool = False  # not in the request, so not in the call

    def schema(self) -> dict[str, Any]:
        return {"type": self.type, **({"enum": list(self.choices)} if self.choices else {})}


@dataclass(frozen=True)
class Tool:
    name: str
    description: str
    params: tuple[Param, ...]
    ask: str  # the request without its values
    noun: str
    verb: str = ""
    family: str = ""  # of tools everybody tries: two of one family cannot be told apart

    def schema(self) -> dict[str, Any]:
        properties = {p.key: p.schema() for p in self.params}
        parameters = {"type": "object", "properties": properties, "required": [p.key for p in self.params if not p.optional]}
        return {"type": "function", "function": {"name": self.name, "description": self.description, "parameters": parameters}}


_NAMED = [" with {k} {{}}", " using {k} {{}}", " where the {k} is {{}}", " ({k} {{}})", ", {k} {{}}", ", {k}: {{}}", " with {k} set to {{}}", " and {k} {{}}", " with a {k} of {{}}", " with {k}={{}}"]


def param(d: Draw) -> Param:
    kind = d.any(["city", "person", "day", "time", "number", "title", "id", "color", "text", "coined", "coined", "choice"])
    if d.chance(0.25) and kind not in ("coined", "number", "text"):  # any kind of value under any name
        key = d.value(NOUNS) if d.chance(0.5) else d.coined()
        if kind != "choice":
            return Param(key, "string", kind, d.any(_NAMED).format(k=key))
    if kind == "city":
        return Param(d.any(["city", "location", "place", "destination"]), "string", kind, d.any([" in {}", " for {}", " near {}"]))
    if kind == "person":
        return Param(d.any(["name", "user", "person", "recipient", "owner"]), "string", kind, d.any([" for {}", " of {}"]))
    if kind == "day":
        return Param(d.any(["day", "date", "when"]), "string", kind, d.any([" on {}", " for {}"]))
    if kind == "time":
        return Param(d.any(["time", "hour", "start"]), "string", kind, " at {}")
    if kind == "number":
        key = d.any(["count", "limit", "quantity", "amount", "level", "size", "page", "year", "max_results", d.value(NOUNS)])
        return Param(key, "integer", kind, d.any(_NAMED[:7]).format(k=key) if d.chance(0.5) else " with " + key + " {}")
    if kind == "title":
        return Param(d.any(["title", "query", "topic", "label"]), "string", kind, d.any([' called "{}"', " about {}", ' named "{}"']))
    if kind == "id":
        key = d.any(["id", "code", "key", "ref"])
        return Param(key, "string", kind, d.any(_NAMED[:3]).format(k=key) if d.chance(0.4) else " with " + key + " {}")
    if kind == "color":
        return Param(d.any(["color", "colour"]), "string", kind, " with color {}")
    if kind == "text":
        return Param(d.any(["text", "message", "body", "note"]), "string", kind, d.any([' saying "{}"', ' with text "{}"']))
    if kind == "choice":
        key = d.any(["unit", "mode", "format", "type", "style", d.coined()])
        return Param(key, "string", kind, d.any([" in {}", " as {}", *(form.format(k=key) for form in _NAMED[:3])]), tuple(dict.fromkeys(phrase(d, 1, 1) for _ in range(d.int(2, 4)))))
    key = d.coined()
    whole = d.chance(0.4)
    return Param(key, "integer" if whole else "string", "number" if whole else "word", d.any(_NAMED).format(k=key) if d.chance(0.6) else " with " + key + " {}")


def value(d: Draw, p: Param) -> str | int:
    if p.choices:
        return d.any(p.choices)
    if p.kind == "city":
        return d.city() + (f", {d.any(['CA', 'NY', 'TX', 'UK', 'France', 'Japan', 'Germany', 'USA', 'Italy'])}" if d.chance(0.1) else "")
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
    if p.kind == "sum":
        gap = d.any([" ", ""])
        return f"{d.int(1, 99)}{gap}{d.any('+-*/')}{gap}{d.int(1, 99)}"
    return d.coined()


_CITY, _DAY, _PERSON = "city", "day", "person"
_UNIT = Param("unit", "string", "choice", " in {}", ("celsius", "fahrenheit"), optional=True)

# The tools that everybody tries first: name, description, ways to ask, parameters.
CLASSICS: list[tuple[str, str, list[str], list[Param]]] = [
    ("get_weather", "Get the weather of a city.", ["What is the weather", "What's the weather", "Get the weather", "How is the weather", "What is the weather like", "Tell me the weather", "what is the weather", "Is it raining", "Is it sunny", "Show me the weather", "I need the weather"], [Param("city", "string", _CITY, " in {}")]),
    ("get_weather", "Get the current weather for a location.", ["What is the weather", "What's the weather", "Get the weather", "How is the weather", "What's the weather like", "Will it rain", "weather", "Check the weather"], [Param("location", "string", _CITY, " in {}"), _UNIT]),
    ("get_current_weather", "Get the current weather in a given location.", ["What is the weather", "What's the weather like", "What's the weather like today", "How warm is it", "How cold is it"], [Param("location", "string", _CITY, " in {}"), _UNIT]),
    ("get_weather_forecast", "Get the forecast.", ["What is the forecast", "Get the forecast", "Show me the weather forecast"], [Param("city", "string", _CITY, " for {}"), Param("day", "string", _DAY, " on {}")]),
    ("get_time", "Get the current time in a city.", ["What time is it", "What is the time", "Tell me the time", "what's the time", "Get the time"], [Param("city", "string", _CITY, " in {}")]),
    ("search", "Search the web.", ["Search", "search", "Look", "Please search"], [Param("query", "string", "title", " for {}")]),
    ("web_search", "Search the web.", ["Search the web", "Look on the web", "Search online", "Google", "Please search the internet"], [Param("query", "string", "title", " for {}")]),
    ("send_email", "Send an email.", ["Send an email", "Write an email", "Email", "Please send an email", "Send a mail"], [Param("to", "string", _PERSON, " to {}"), Param("body", "string", "text", ' saying "{}"')]),
    ("send_message", "Send a message to somebody.", ["Send a message", "Send a text", "Please send a message"], [Param("recipient", "string", _PERSON, " to {}"), Param("text", "string", "text", ' saying "{}"')]),
    ("read_file", "Read a file.", ["Read the file", "Show me the file", "Open the file", "What is in the file", "Please read", "Read"], [Param("path", "string", "path", " {}")]),
    ("write_file", "Write text to a file.", ["Write a file", "Create a file", "Make the file"], [Param("path", "string", "path", " {}"), Param("content", "string", "text", ' with text "{}"')]),
    ("list_files", "List the files in a folder.", ["List the files", "Show the files", "What files are", "ls"], [Param("path", "string", "path", " in {}")]),
    ("run_command", "Run a shell command.", ["Run the command", "Execute", "Run", "Please run"], [Param("command", "string", "text", " `{}`")]),
    ("get_stock_price", "Get the price of a stock.", ["What is the stock price", "Get the stock price", "How much is the stock", "Show me the price"], [Param("symbol", "string", "id", " of {}")]),
    ("add", "Add two numbers.", ["Add", "add", "What is the sum of", "Please add"], [Param("a", "integer", "number", " {}"), Param("b", "integer", "number", " and {}")]),
    ("multiply", "Multiply two numbers.", ["Multiply", "multiply", "What is the product of"], [Param("a", "integer", "number", " {}"), Param("b", "integer", "number", " and {}")]),
    ("set_timer", "Set a timer.", ["Set a timer", "Start a timer", "Please set a timer"], [Param("minutes", "integer", "number", " for {} minutes")]),
    ("translate", "Translate text.", ["Translate", "translate", "Please translate"], [Param("text", "string", "text", ' "{}"'), Param("language", "string", "word", " to {}")]),
    ("book_flight", "Book a flight.", ["Book a flight", "I need a flight", "Book me a flight"], [Param("origin", "string", _CITY, " from {}"), Param("destination", "string", "city", " to {}"), Param("date", "string", _DAY, " on {}")]),
    ("calculate", "Evaluate an expression.", ["Calculate", "Compute", "What is", "Evaluate", "what is", "How much is"], [Param("expression", "string", "sum", " {}")]),
    ("calculator", "A calculator.", ["Calculate", "Compute", "What is", "Evaluate", "what is", "How much is", "calculate"], [Param("expression", "string", "sum", " {}")]),
    ("Bash", "Run a shell command.", ["Run the command", "Execute", "Run", "Please run", "Run this in the shell:"], [Param("command", "string", "text", " `{}`"), Param("description", "string", "text", "", optional=True)]),
    ("Read", "Read a file.", ["Read the file", "Show me the file", "Open the file", "What is in", "Read"], [Param("file_path", "string", "path", " {}")]),
    ("search_web", "Search the web.", ["Search the web", "Look on the web", "Search online", "Find on the web"], [Param("query", "string", "title", " for {}")]),
]  # fmt: skip


def classic(d: Draw) -> Tool:
    name, description, asks, params = d.any(CLASSICS)
    family = next((word for word in ("weather", "search", "send", "file", "stock") if word in name), name)
    return Tool(name, description, tuple(params), d.any(asks), name, family=family)


_DESCRIBE = Grammar("{V} (a|the) {n}.", "(Use this to|Can|Tool to|Function to) {v} (a|the) {n}.", "{V} {n}s.", "{V} (a|the) {n} of the user.")
_REQUEST = Grammar(
    "{V} the {n}", "(Please|please|Can you|Could you|Now|I want you to) {v} the {n}", "{V} (a|my|our) {n}", "(Please|Can you|I need you to) {v} (a|my) {n}", "(I would like to|I need to|Let's|Help me) {v} (a|the|my) {n}",
    "{v} the {n}", "{v} {n}", "Use {name} to {v} the {n}",
)  # fmt: skip
_NOUN_ONLY = Grammar("(I need the|What about the|I want the|The|Give me the|Show me the|How is the|Where is the|What is the) {n}", "{n}", "(My|Our) {n}")
_ALIKE = {
    "get": ["fetch", "show me", "give me", "retrieve"], "show": ["display", "let me see"], "find": ["locate", "look for"], "create": ["make", "set up"], "delete": ["erase", "get rid of"], "remove": ["take away", "drop"],
    "send": ["deliver", "pass on"], "start": ["begin", "launch"], "stop": ["end", "halt"], "list": ["show all of", "enumerate"], "update": ["change", "modify"], "check": ["inspect", "verify"], "search": ["look through"], "cancel": ["call off"],
    "book": ["reserve"], "order": ["buy"], "compare": ["contrast"], "save": ["store"], "open": ["unfold"], "close": ["shut"],
}  # fmt: skip


def tool(d: Draw) -> Tool:
    if d.chance(0.15) and not d.held:
        return classic(d)
    return named(d, d.value(VERBS) if d.chance(0.6) else d.coined(), d.value(NOUNS) if d.chance(0.6) else d.coined())


def named(d: Draw, verb: str, noun: str) -> Tool:
    style = d.int(0, 4)
    name = f"{verb}_{noun}" if style < 2 else verb + noun.capitalize() if style == 2 else f"{noun}_{verb}" if style == 3 else f"{verb}-{noun}"
    roll = d.rng.random()
    if roll < 0.15:
        name = f"{d.coined(1, 2)}{d.any(['_', '_', '__', '.', '-'])}{name}"
    elif roll < 0.25:
        name = d.any([verb.capitalize() + noun.capitalize(), noun.capitalize(), noun, f"{name}_{d.coined(1, 2)}"])
    params: dict[str, Param] = {}
    for _ in range(d.any([0, 1, 1, 1, 2, 2, 2, 3])):
        p = param(d)
        if p.kind not in {q.kind for q in params.values()} and p.says not in {q.says for q in params.values()}:
            params[p.key] = replace(p, optional=d.chance(0.15))
    fill = {"v": verb, "V": verb.capitalize(), "n": noun, "name": name}
    said = d.any(_ALIKE[verb]) if verb in _ALIKE and d.chance(0.25) else verb
    if not d.held and d.chance(0.15):  # practice only: the noun has to tell which tool is meant, whatever the verb, even another tool's
        said = d.value(VERBS) if d.chance(0.5) else d.any([d.coined(), "take care of", "do", "handle", "deal with", "work on", "see to", "look after"])
    ask = d.frame(_NOUN_ONLY if d.chance(0.1) else _REQUEST).format(**{**fill, "v": said, "V": said.capitalize()})
    return Tool(name, d.frame(_DESCRIBE).format(**fill) if d.chance(0.9) else d.prose(d.int(4, 20)).rstrip(",."), tuple(params.values()), ask, noun, verb)


def toolbox(d: Draw, count: int) -> list[Tool]:
    """Tools that a request can tell apart: by their nouns, or now and then by the verb alone."""
    tools: dict[str, Tool] = {}
    alike = d.chance(0.25)

    def plain(t: Tool) -> bool:
        return t.verb in t.ask.lower().split()

    while len(tools) < count:
        drawn = tool(d)
        if alike and tools and d.chance(0.5) and (model := next(iter(tools.values()))).verb:
            drawn = named(d, d.value(VERBS) if d.chance(0.6) else d.coined(), model.noun)
        same = [t for t in tools.values() if t.noun == drawn.noun or drawn.family and t.family == drawn.family]
        if all(alike and drawn.verb and drawn.verb != t.verb and plain(t) and plain(drawn) for t in same):
            tools.setdefault(drawn.name, drawn)
    return list(tools.values())


def request(d: Draw, chosen: Tool) -> tuple[str, dict[str, Any]]:
    given = [p for p in chosen.params if not p.optional]
    arguments = {p.key: value(d, p) for p in given}
    return chosen.ask + "".join(p.says.format(arguments[p.key]) for p in given), arguments


def _opening(d: Draw) -> list[dict[str, Any]]:
    """Now and then a system prompt or an earlier exchange before the request."""
    messages: list[dict[str, Any]] = []
    if d.chance(0.25):
        messages.append(system(d.any(["You are a helpful assistant.", "Use the tools when they help.", "You are an agent. Be brief.", f"You are {d.person()}, an assistant with tools.", " ".join(filler(d, d.int(2, 8)))])))
    if d.chance(0.15):
        base = known("fact", IDENTITY)(d)
        messages += [*base.messages, assistant(base.reply)]
    return messages


def _earlier(d: Draw, tools: list[Tool]) -> list[dict[str, Any]]:
    """Now and then a call made before, its result and the answer."""
    if not d.chance(0.12):
        return []
    chosen = d.any(tools)
    text, arguments = request(d, chosen)
    result = _result(d)
    call = {"id": f"call_{d.int(1, 99)}", "type": "function", "function": {"name": chosen.name, "arguments": arguments}}
    return [user(text), {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": json.dumps(result)}, assistant(said(result))]


def said(*results: dict[str, Any]) -> str:
    listed = [f"{k} is {v}" for result in results for k, v in result.items()]
    return "The result: " + (", ".join(listed[:-1]) + " and " if len(listed) > 1 else "") + listed[-1] + "."


def _count(d: Draw) -> int:
    return d.any([1, 2, 2, 3, 3, 4, 4, 5]) if d.chance(0.93) else d.int(6, 10)


def ending(d: Draw, chosen: Tool) -> str:
    """How a request ends; of the words that follow none belongs to a value."""
    day = any(p.kind == "day" for p in chosen.params)
    return d.any([".", "", "?", ".", "", " please.", " please", ", please.", ", thanks.", " right now.", "." if day else " today?", "?" if day else " now?", " for me.", ", ok?"])


def one_call(d: Draw) -> Sample:
    tools = toolbox(d, _count(d) if not d.held else d.int(2, 5))
    chosen = d.any(tools)
    text, arguments = request(d, chosen)
    messages = [*_opening(d), *_earlier(d, tools), user(text + ending(d, chosen))]
    return Sample("tool call", messages, call_text(chosen.name, arguments), Check("calls", [[chosen.name, arguments]]), [t.schema() for t in tools])


def two_calls(d: Draw) -> Sample:
    tools = toolbox(d, max(2, _count(d)))
    if d.chance(0.4) and (named := [t for t in tools if any(not p.optional for p in t.params)]):
        first = second = d.any(named)
        given = [p for p in first.params if not p.optional]
        arguments = {p.key: value(d, p) for p in given}
        last = given[-1]
        other = {**arguments, last.key: value(d, last)}
        while other == arguments and not (last.choices and len(last.choices) < 2):
            other[last.key] = value(d, last)
        text = first.ask + "".join(p.says.format(arguments[p.key]) for p in given) + f" and{(last.says if d.chance(0.6) else ' {}').replace(' and', '', 1).removeprefix(',').format(other[last.key])}"
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
        near = any(words & set(t.ask.lower().split()) for t in tools) and d.chance(0.7)  # a verb may be shared, but
        near |= absent.noun in {t.noun for t in tools} or absent.family in {t.family for t in tools} - {""}  # never the thing itself
        if absent.name not in {t.name for t in tools} and not near:
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
    reply = said(result)
    want = tuple(str(v) for v in result.values())
    roll = d.rng.random()
    if roll < 0.1:
        reason = phrase(d, 2, 4)
        content, reply, want = json.dumps({"error": reason}), f"The tool failed: {reason}.", (reason,)
    elif roll < 0.3:
        content = phrase(d, 1, 4) if d.chance(0.6) else f"{d.int(1, 40)} degrees, {d.any(['sunny', 'rainy', 'cloudy', 'windy', 'snow'])} in {d.city()}"
        reply, want = f"The result: {content}.", (content,)
    calls, contents = [call], [content]
    if roll >= 0.8:
        more, other = request(d, d.any(tools))[1], _result(d)
        calls.append({"id": "call_b", "type": "function", "function": {"name": chosen.name, "arguments": more}})
        contents.append(json.dumps(other))
        reply, want = said(result, other), (*want, *(str(v) for v in other.values()))
    answers = [{"role": "tool", "content": c} for c in contents]
    messages = [*_opening(d), *_earlier(d, tools), user(text), {"role": "assistant", "content": "", "tool_calls": calls}, *answers]
    return Sample("tool result", messages, reply, Check("keys", want), [t.schema() for t in tools])
