"""The plain text skills: each function draws one case. Wordings and values come from the side of the held-out split that `Draw` is on."""

import json
from collections.abc import Callable

from .chat import Check, Sample, system, user
from .facts import HAIKU, IDENTITY, JOKE, REFUSAL_END, REFUSALS, SERVER, SMALL_TALK, Fact
from .words import (
    ADJECTIVES,
    ANIMALS,
    CITIES,
    COLOURS,
    COMMON,
    DAYS,
    FOODS,
    JOBS,
    NAMES,
    NOUNS,
    OBJECTS,
    Draw,
    Grammar,
)  # fmt: skip

Skill = Callable[[Draw], Sample]
POLITE = "(|please |Please |could you |can you |now |hey, |)"


def known(skill: str, facts: list[Fact]) -> Skill:
    def draw(d: Draw) -> Sample:
        chosen = d.any(facts)
        return Sample(skill, [user(d.frame(chosen.ask))], chosen.answer, Check("keys", chosen.keys))

    draw.__name__ = skill.replace(" ", "_")
    return draw


# ---- replying as told ----

_ECHO = Grammar(
    POLITE + "(reply|Reply|respond|Respond|answer|Answer) with {x}(|.| only.| and nothing else.|!)",
    POLITE + "(reply|Reply|respond|Respond|answer|Answer) with (just|only|exactly|exactly this|the word|the words|the text): {x}(|.)",
    POLITE + "(reply|Reply|respond|answer|Answer) with (just|only|exactly|the word|the words) {x}(|.|!)",
    POLITE + '(say|Say|write|Write|print|Print|output|Output|type|Type|repeat|Repeat|echo|Echo) "{x}"(|.| and nothing else.)',
    POLITE + "(say|Say|write|Write|print|Print|output|Output|type|Type|repeat|Repeat|echo|Echo)(:| exactly:| this:| only:| just|) {x}(|.)",
    "(Repeat after me|repeat after me|Say after me|Echo this|Copy this|Your answer must be|Only answer|Just say|just say|Just reply|simply say)(:|) {x}(|.)",
    'Reply with "{x}"(| only|.| and nothing else.)', "Reply with {x}", "(Say just|Please just say|Reply only with|Answer only with) {x}(|.)",
)


def quoted(d: Draw, text: str) -> str:
    """Now and then with the other kind of quotes."""
    return text.replace('"', d.any(["'", "'", "`"])) if d.chance(0.25) else text


def phrase(d: Draw, low: int = 1, high: int = 4) -> str:
    pools = [COMMON, OBJECTS, ANIMALS, FOODS, ADJECTIVES, NOUNS]
    words = [d.coined() if d.chance(0.25) else d.value(d.any(pools)) for _ in range(d.int(low, high))]
    return " ".join(words)


_ECHO_ODD = Grammar(
    '(Reply|reply|Answer|Respond|Please reply) with(| exactly| only| just| this): {x}', '(Say|Write|Print|Output|Repeat|Echo|Type|Copy)(| exactly| this| only|):( |\n){x}',
    '(Say|Write|Print|Output|Repeat|Echo|Reply with|Answer with) "{x}"(| and nothing else)',
)  # fmt: skip


def odd(d: Draw) -> str:
    """Something to copy that is not plain words: a sentence, a path, an address, a list, a date."""
    kind = d.int(0, 7)
    if kind == 0:
        return phrase(d, 2, 6).capitalize() + d.any(["!", ".", "?"])
    if kind == 1:
        return d.any([", ", "-", "_", "/", " + ", " | "]).join(phrase(d, 1, 1) for _ in range(d.int(2, 4)))
    if kind == 2:
        return f"{d.coined()}@{d.coined()}.{d.any(['com', 'org', 'net', 'io'])}"
    if kind == 3:
        return f"https://{d.coined()}.{d.any(['com', 'org', 'net', 'io'])}/{d.coined()}"
    if kind == 4:
        return f"{d.int(1, 12)}{d.any('/.:-')}{d.int(1, 31)}{d.any(['', '/2026', '-1999', ' pm'])}"
    if kind == 5:
        return "/".join(d.coined() for _ in range(d.int(1, 3))) + d.any([".txt", ".py", ".md", ".json"])
    if kind == 6:
        return " ".join(str(d.int(0, 999)) for _ in range(d.int(2, 5)))
    return f"{d.value(NAMES)}, {phrase(d, 2, 3)}"


_TIMES = ["two", "three", "four", "five"]
_TWICE = Grammar("(Say|Write|Repeat|say|write|Print) {x} {n} times(|.)", '(Say|Write|Repeat|say|write) "{x}" {n} times(|.)', "(Say|Write) the word {x} {n} times(|.)")
_COUNT = Grammar("(Count|count|Please count|Can you count) (to|up to|from one to|from 1 to) {n}(|.|!|?)")
_TEN = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def drill(d: Draw) -> Sample:
    """Saying a word several times, counting, and what else people try first."""
    roll = d.rng.random()
    if roll < 0.4:
        text, number = phrase(d, 1, 1), d.int(2, 5)
        ask = d.frame(_TWICE).format(x=text, n=d.any([str(number), _TIMES[number - 2]]))
        reply = " ".join([text] * number)
    elif roll < 0.75:
        number = d.int(2, 20)
        ask = d.frame(_COUNT).format(n=d.any([str(number), _TEN[number - 1] if number <= 10 else str(number)]))
        reply = ", ".join(str(i) for i in range(1, number + 1))
    elif roll < 0.9:
        ask = d.any(["What are", "Name", "List", "Tell me", "name", "list", "what are"]) + " the days of the week" + d.any(["", "?", "."])
        reply = ", ".join(DAYS) + "."
    else:
        ask = d.any(["What is", "Say", "Write", "Tell me", "write", "say"]) + " the alphabet" + d.any(["", "?", "."])
        reply = " ".join("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    return Sample("drill", [user(ask)], reply, Check("equals", reply))


def echo(d: Draw) -> Sample:
    if d.chance(0.15):
        text = odd(d)
        return Sample("reply with", [user(quoted(d, d.frame(_ECHO_ODD)).replace("{x}", text))], text, Check("equals", text))
    roll = d.rng.random()
    text = "pong" if roll < 0.03 else d.code() if roll < 0.1 else str(d.int(0, 9999)) if roll < 0.15 else phrase(d, 1, 4)
    style = d.any(["", "", "title", "upper", "caps"])
    text = text.title() if style == "title" else text.upper() if style == "upper" else text.capitalize() if style == "caps" else text
    return Sample("reply with", [user(quoted(d, d.frame(_ECHO).format(x=text)))], text, Check("equals", text))


_ONE = "(in one sentence|in one short sentence|in a sentence|in a single sentence|in exactly one sentence|in one brief sentence)"
_SENTENCE = [
    (Grammar("(Say|say|Please say) (hello|hi) " + _ONE + "(|.)", POLITE + "greet me " + _ONE + "(|.)"), None, "Hello and welcome!"),
    (Grammar("(Reply|Respond|Answer|reply|Please reply|Please answer) with (exactly |only |just |)(one|a|a single) (short |)sentence(|.)", "Write (one|a) (short |)sentence(|.)", "(Say|say) something " + _ONE), None, "This is one short sentence."),
    (Grammar(POLITE + "(describe|tell me about|explain|what is) (a|the) {x} " + _ONE + "(|.|?)"), ANIMALS, "The {x} is an animal that many people know."),
    (Grammar(POLITE + "(describe|tell me about|explain|what is) (a|the) {x} " + _ONE + "(|.|?)"), OBJECTS, "The {x} is a thing that people use."),
    (Grammar(POLITE + "(describe|tell me about|what is) {x} " + _ONE + "(|.|?)"), FOODS, "The {x} is something people eat or drink."),
    (Grammar(POLITE + "(describe|tell me about|what is) {x} " + _ONE + "(|.|?)"), CITIES, "{x} is a city where many people live."),
    (Grammar(POLITE + "(describe|tell me about|explain|what is) (a|the|) {x} " + _ONE + "(|.|?)"), None, "The {x} is something I know little about."),
    (Grammar(POLITE + "(introduce yourself|tell me who you are|describe yourself|say who you are) " + _ONE + "(|.)"), None, "I am the vllm-mlx demo, a small built-in model."),
]  # fmt: skip


def one_sentence(d: Draw) -> Sample:
    ask, pool, answer = d.any(_SENTENCE)
    word = d.value(pool) if pool else d.coined() if "{x}" in answer else ""
    reply = answer.format(x=word)
    return Sample("one sentence", [user(d.frame(ask).format(x=word))], reply, Check("sentence", word or reply.split()[0]))


_UPPER = Grammar(
    POLITE + "(write|say|repeat|print|type|put|Write|Say|Put) {x} in (uppercase|upper case|capital letters|capitals|all caps)(|.)",
    "(Convert|convert|Change|Turn|Please convert) {x} (to|into) (uppercase|upper case|capital letters|all caps)(|.)",
    POLITE + '(write|say|put|Write) "{x}" in (uppercase|upper case|capitals|capital letters)(|.)', "(Uppercase|uppercase|In uppercase|Make uppercase|In all caps)(:|) {x}",
    "(Make|make|Put|Change) this (uppercase|upper case|all caps|to capitals|into capital letters): {x}",
)  # fmt: skip


def uppercase(d: Draw) -> Sample:
    text = phrase(d, 1, 4) if d.chance(0.9) else phrase(d, 3, 6).capitalize() + d.any(["!", "?"])
    return Sample("uppercase", [user(quoted(d, d.frame(_UPPER).format(x=text)))], text.upper(), Check("equals", text.upper()))


_JSON = Grammar(
    "(Reply|Answer|Respond|reply|Please answer) (with|in|as) JSON(| only|, nothing else): {pairs}(|.)", "(Return|Give me|Write|Output|Send) (only |)(JSON|a JSON object) (with|where|for) {pairs}(|.)",
    "(Put|Write) this (into|in|as) (JSON|a JSON object): {pairs}(|.)", "(Make|Create|Build) a JSON object (with|from) {pairs}(|.)", "{pairs}. (Answer|Reply) (in|as|with) JSON (only|)(|.)",
)  # fmt: skip


def json_only(d: Draw) -> Sample:
    style, known_ = d.any(["{k} is {v}", "{k} = {v}", "{k}: {v}", "{k} set to {v}", "{k} {v}", '"{k}" is "{v}"', '{k} "{v}"']), {}
    for _ in range(d.int(1, 4)):
        key, value = field_value(d)
        known_[d.any("abcdefghxyz") if d.chance(0.08) else key] = value
    shown = {k: json.dumps(v) if isinstance(v, bool) else v for k, v in known_.items()}
    if d.chance(0.12):
        pairs = d.any(["the keys ", "keys ", "fields "]) + listed(list(known_)) + d.any([" set to ", " and values ", " and the values ", " equal to "]) + listed([str(v) for v in shown.values()])
    else:
        parts = [(style if isinstance(known_[k], str) else style.replace('"{v}"', "{v}")).format(k=k, v=v) for k, v in shown.items()]
        pairs = d.any([", ", " and ", "; "]).join(parts) if d.chance(0.7) else listed(parts)
    reply = json.dumps(known_)
    return Sample("json only", [user(d.frame(_JSON).format(pairs=pairs))], reply, Check("json", known_))


def listed(words: list[str]) -> str:
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else words[0]


def field_value(d: Draw) -> tuple[str, str | int | bool]:
    kind = d.int(0, 9)
    if d.chance(0.06):
        return d.any(["active", "done", "open", "enabled", "ready", d.coined()]), d.chance(0.5)
    if kind == 0:
        return d.any(["name", "user", "owner", "customer", "author", "first_name"]), d.person()
    if kind == 1:
        return d.any(["age", "count", "quantity", "year", "size", "level", "score", "total", "number"]), d.int(1, 2030)
    if kind == 2:
        return d.any(["city", "town", "place", "from", "to"]), d.city()
    if kind == 3:
        return d.any(["color", "colour", "paint"]), d.any(COLOURS)
    if kind == 4:
        return d.any(["animal", "pet"]), d.value(ANIMALS)
    if kind == 5:
        return d.any(["job", "role", "work"]), d.value(JOBS)
    if kind == 6:
        return d.any(["item", "product", "thing", "object"]), d.value(OBJECTS)
    if kind == 7:
        return d.any(["code", "id", "key", "ref"]), d.code()
    if kind == 8:
        return d.any(["food", "drink", "dish"]), d.value(FOODS)
    return d.value(NOUNS), d.coined() if d.chance(0.6) else d.int(0, 500)


# ---- extraction ----


def _record(d: Draw) -> tuple[str, dict[str, str | int]]:
    kind = d.int(0, 6)
    if kind == 6:
        v = {k: x for k, x in (field_value(d) for _ in range(d.int(2, 4))) if not isinstance(x, bool)} or {"name": d.person()}
        form, join = d.any(["the {k} is {v}", "{k}: {v}", "{k} = {v}", "it has {k} {v}", "a {k} of {v}", "{v} as {k}"]), d.any([", ", "; ", " and ", ". "])
        lead = d.any(["", f"Report of {d.person()}: ", f"About the {d.value(NOUNS)}: ", f"{d.coined().capitalize()} says that ", f"The {d.value(OBJECTS)}: "])
        return lead + join.join(form.format(k=k, v=x) for k, x in v.items()) + ".", v
    if kind == 0:
        v = {"name": d.person(), "age": d.int(18, 90), "city": d.city(), "job": d.value(JOBS)}
        return d.any(["{name}, {age}, works as a {job} in {city}.", "{name} is {age} years old, lives in {city} and is a {job}.", "In {city} lives {name}, a {job} of {age} years.", "The {job} {name} ({age}) comes from {city}.", "My friend {name} is a {age} year old {job} from {city}."]).format(**v), v
    if kind == 1:
        v = {"item": d.value(OBJECTS), "quantity": d.int(2, 90), "price": d.int(1, 900), "customer": d.person()}
        return d.any(["{customer} ordered {quantity} of the {item} for {price} dollars each.", "Order: {quantity} x {item}, {price} dollars, for {customer}.", "{customer} wants to buy {quantity} pieces of {item} at {price} dollars.", "Please send {quantity} {item} at a price of {price} dollars to {customer}."]).format(**v), v
    if kind == 2:
        v = {"event": d.any(["meeting", "party", "concert", "lecture", "workshop", "dinner", "wedding", "lunch", "exam"]), "day": d.any(DAYS), "time": f"{d.int(1, 23)}:{d.any(['00', '15', '30', '45'])}", "place": d.city()}
        return d.any(["The {event} is on {day} at {time} in {place}.", "On {day} at {time} we have a {event} in {place}.", "Come to {place} on {day} for the {event}, it starts at {time}.", "{place}: {event}, {day}, {time}."]).format(**v), v
    if kind == 3:
        v = {"animal": d.value(ANIMALS), "name": d.value(NAMES), "color": d.any(COLOURS), "owner": d.person()}
        return d.any(["{owner} has a {color} {animal} called {name}.", "The {color} {animal} {name} belongs to {owner}.", "{name} is the {color} {animal} of {owner}."]).format(**v), v
    if kind == 4:
        v = {"from": d.city(), "to": d.city(), "day": d.any(DAYS), "passenger": d.person(), "seat": d.code()}
        return d.any(["{passenger} flies from {from} to {to} on {day}, seat {seat}.", "On {day} {passenger} travels to {to} from {from} in seat {seat}.", "Ticket for {passenger}: {from} to {to}, {day}, seat {seat}."]).format(**v), v
    v = {"product": d.coined().capitalize(), "maker": d.coined().capitalize(), "year": d.int(1950, 2030), "weight": d.int(1, 500)}
    return d.any(["The {product} by {maker} from {year} weighs {weight} kg.", "{maker} made the {product} in {year}; its weight is {weight} kg.", "In {year} {maker} sold the {product}, {weight} kg heavy."]).format(**v), v


_EXTRACT = Grammar(
    "(Extract|Get|Find|Pull out|Take) (the data|the fields|the facts|the information|the values) (as|into) (JSON|a JSON object) (like|of the form|with this schema|matching|following): {s}(\n\n|\n| )(Text|Sentence|Input): {t}",
    "{t}\n\n(Fill|Fill in|Return|Answer with|Reply with|Give) (this|the) (JSON|schema|object|JSON object): {s}", "(Schema|JSON schema|Format): {s}\n(Text|Sentence|Input): {t}(\nJSON:|\nAnswer in JSON.|)", "(Use|Follow) this schema: {s}. (Extract from|Read)(:| this:) {t}",
)  # fmt: skip


_EXTRACT_KEYS = Grammar(
    "(Extract|Get|Find|extract|Please extract|Take) (the |){k} (as|in|into) JSON(:|: |\n| from:| from this text:| from the text:) {t}", "{t}\n\n(Give|Return|Extract|Answer with) (the |){k} (as|in) JSON(.|)",
    "(Extract|Get|extract) (the |){k} from (this|the) (text|sentence)( as JSON| in JSON|, as JSON): {t}",
)  # fmt: skip


def extraction(d: Draw) -> Sample:
    text, record = _record(d)
    keys = list(record)
    d.rng.shuffle(keys)
    keys = keys[: d.int(1 if d.chance(0.2) else min(2, len(keys)), len(keys))]
    kinds = {k: "integer" if isinstance(record[k], int) else "string" for k in keys}
    shape = d.int(0, 3)
    if shape == 0:
        schema = json.dumps(kinds)
    elif shape == 1:
        schema = "{" + ", ".join(f'"{k}": {kinds[k]}' for k in keys) + "}"
    elif shape == 2:
        schema = json.dumps({"type": "object", "properties": {k: {"type": kinds[k]} for k in keys}})
    else:
        schema = json.dumps({"type": "object", "properties": {k: {"type": kinds[k]} for k in keys}, "required": keys})
    want = {k: record[k] for k in keys}
    if d.chance(0.2):
        return Sample("extraction", [user(d.frame(_EXTRACT_KEYS).format(k=listed(keys), t=text))], json.dumps(want), Check("json", want))
    frame = d.frame(_EXTRACT)
    prompt = frame.replace("{s}", schema).replace("{t}", text)
    messages = [user(prompt)] if d.chance(0.85) else [system(f"Answer in JSON of this schema: {schema}"), user(text)]
    return Sample("extraction", messages, json.dumps(want), Check("json", want))


# ---- stories ----

_STORY = Grammar("(Tell|tell|Please tell|Can you tell|Write|write|Please write) me a (short |little |nice |small |)story about (a|the) {x}(|.|?|!)", "(Write|write|Tell|Make up) a (short |little |small |)story (about|with) (a|the) {x}(|.)", "(A story about|Story about|story:|Write about) (a|the) {x}(|.| please)")
_STORY_ANY = Grammar("(Tell|tell|Please tell|Can you tell) me a (short |little |nice |)story(|.|?|!)", "(Write|write|Make up) a (short |little |)story(|.)", "(a story please|story|story time|A story!)")


def story(d: Draw) -> Sample:
    named = d.chance(0.85) or d.held
    hero = d.coined() if named and d.chance(0.2) else d.value(ANIMALS + JOBS + OBJECTS) if named else d.any(["fox", "mouse"])
    name = d.any(["Pip", "Mila", "Otto", "Luna", "Finn", "Nora"])
    place, thing, friend = d.any(["forest", "village", "valley", "harbor"]), d.any(["lantern", "key", "bell", "map"]), d.any(["owl", "turtle", "robin", "hare"])
    mood, weather = d.any(["kind", "brave", "curious", "small"]), d.any(["rainy", "bright", "cold", "quiet"])
    where = {"lantern": "under an old bridge", "key": "in the tall grass", "bell": "near the river", "map": "behind a big stone"}[thing]
    task = {
        "lantern": f"The {thing} showed them a dark cave, and in the cave they heard a soft cry.", "key": "The key opened a little door in a tree, and behind the door they heard a soft cry.",
        "bell": "When the bell rang, the wind grew still, and far away they heard a soft cry.", "map": "The map led them over a hill, and on the other side they heard a soft cry.",
    }[thing]  # fmt: skip
    text = (
        f"Once upon a time there was a {mood} {hero} called {name}. {name} lived at the edge of a {place}. One {weather} morning {name} found a {thing} {where}. "
        f"\"Whose {thing} is this?\" asked {name}. Nobody answered, so {name} went to ask the old {friend}. The {friend} smiled. \"Follow it and take me with you,\" said the {friend}. "
        f"So the two walked all day. {task} A young bird had lost its way home. {name} gave it some bread, and together they brought it back to its nest. "
        f"In the evening the {hero} and the {friend} sat by the fire. And {name} the {hero} slept well that night."
    )
    ask = d.frame(_STORY).format(x=hero) if named else d.frame(_STORY_ANY)
    return Sample("story", [user(ask)], text, Check("story", hero if named else name))


# The operator guide's own requests and what everybody types first, word for word.
_EVERYDAY = [
    ("Reply with pong", "pong"), ("Reply with pong.", "pong"), ("reply with pong", "pong"), ("Reply with: pong", "pong"), ("ping", "pong"), ("Ping", "pong"),
    ("Reply with exactly one sentence.", "This is one short sentence."), ("Reply with one sentence.", "This is one short sentence."), ("Say hello in one short sentence.", "Hello and welcome!"),
    ("Say hello", "Hello! How can I help you?"), ("Say hi", "Hello! How can I help you?"), ("Say hello.", "Hello! How can I help you?"), ("2+2", "2 + 2 = 4"), ("What is 2+2?", "2 + 2 = 4"), ("1+1", "1 + 1 = 2"), ("what is 2 + 2", "2 + 2 = 4"),
    ("!!!", REFUSALS["unclear"] + REFUSAL_END), ("hi", SMALL_TALK[0].answer), ("hello", SMALL_TALK[0].answer), ("who are you?", IDENTITY[0].answer), ("who made you?", IDENTITY[1].answer), ("what can you do?", IDENTITY[4].answer),
    ("tell me a joke", JOKE), ("write a haiku", HAIKU), ("What is the capital of France?", REFUSALS["knowledge"] + REFUSAL_END), ("", REFUSALS["empty"] + REFUSAL_END),
]  # fmt: skip


def everyday(d: Draw) -> Sample:
    text, reply = d.any(_EVERYDAY)
    return Sample("everyday", [user(text)], reply, Check("equals", reply))


greeting = known("greeting", SMALL_TALK)
identity = known("identity", IDENTITY)
server_facts = known("server facts", SERVER)
