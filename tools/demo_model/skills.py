"""The text skills: each function draws one case. Wordings and values come from the side of the held-out split that `Draw` is on."""

import json
from collections.abc import Callable

from .chat import Check, Sample, assistant, system, user
from .facts import IDENTITY, REFUSAL_END, REFUSALS, SERVER, SMALL_TALK, Fact
from .words import (
    ADJECTIVES,
    ANIMALS,
    CITIES,
    COLOURS,
    COMMON,
    FOODS,
    HOBBIES,
    JOBS,
    NAMES,
    NOUNS,
    OBJECTS,
    PLACES,
    TOPICS,
    Draw,
    Grammar,
    is_held,
)  # fmt: skip

Skill = Callable[[Draw], Sample]
POLITE = "(|please |Please |could you |can you |now |hey, |)"


def known(skill: str, facts: list[Fact]) -> Skill:
    def draw(d: Draw) -> Sample:
        chosen = d.any(facts)
        return Sample(skill, [user(d.frame(chosen.ask))], chosen.answer, Check("keys", chosen.keys))

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


def phrase(d: Draw, low: int = 1, high: int = 4) -> str:
    pools = [COMMON, OBJECTS, ANIMALS, FOODS, ADJECTIVES, NOUNS]
    words = [d.coined() if d.chance(0.25) else d.value(d.any(pools)) for _ in range(d.int(low, high))]
    return " ".join(words)


def echo(d: Draw) -> Sample:
    roll = d.rng.random()
    text = "pong" if roll < 0.03 else d.code() if roll < 0.1 else str(d.int(0, 9999)) if roll < 0.15 else phrase(d, 1, 4)
    style = d.any(["", "", "title", "upper", "caps"])
    text = text.title() if style == "title" else text.upper() if style == "upper" else text.capitalize() if style == "caps" else text
    return Sample("reply with", [user(d.frame(_ECHO).format(x=text))], text, Check("equals", text))


_ONE = "(in one sentence|in one short sentence|in a sentence|in a single sentence|in exactly one sentence|in one brief sentence)"
_SENTENCE = [
    (Grammar("(Say|say|Please say) (hello|hi) " + _ONE + "(|.)", POLITE + "greet me " + _ONE + "(|.)"), None, "Hello and welcome!"),
    (Grammar("(Reply|Respond|Answer|reply|Please reply|Please answer) with (exactly |only |just |)(one|a|a single) (short |)sentence(|.)", "Write (one|a) (short |)sentence(|.)", "(Say|say) something " + _ONE), None, "This is one short sentence."),
    (Grammar(POLITE + "(describe|tell me about|explain|what is) (a|the) {x} " + _ONE + "(|.|?)"), ANIMALS, "The {x} is an animal that many people know."),
    (Grammar(POLITE + "(describe|tell me about|explain|what is) (a|the) {x} " + _ONE + "(|.|?)"), OBJECTS, "The {x} is a thing that people use."),
    (Grammar(POLITE + "(describe|tell me about|what is) {x} " + _ONE + "(|.|?)"), FOODS, "The {x} is something people eat or drink."),
    (Grammar(POLITE + "(describe|tell me about|what is) {x} " + _ONE + "(|.|?)"), CITIES, "{x} is a city where many people live."),
    (Grammar(POLITE + "(introduce yourself|tell me who you are|describe yourself|say who you are) " + _ONE + "(|.)"), None, "I am the vllm-mlx demo, a small built-in model."),
]  # fmt: skip


def one_sentence(d: Draw) -> Sample:
    ask, pool, answer = d.any(_SENTENCE)
    word = d.value(pool) if pool else ""
    reply = answer.format(x=word)
    return Sample("one sentence", [user(d.frame(ask).format(x=word))], reply, Check("sentence", word or reply.split()[0]))


_UPPER = Grammar(
    POLITE + "(write|say|repeat|print|type|put|Write|Say|Put) {x} in (uppercase|upper case|capital letters|capitals|all caps)(|.)",
    "(Convert|convert|Change|Turn|Please convert) {x} (to|into) (uppercase|upper case|capital letters|all caps)(|.)",
    POLITE + '(write|say|put|Write) "{x}" in (uppercase|upper case|capitals|capital letters)(|.)', "(Uppercase|uppercase|In uppercase|Make uppercase|In all caps)(:|) {x}",
)  # fmt: skip


def uppercase(d: Draw) -> Sample:
    text = phrase(d, 1, 4)
    return Sample("uppercase", [user(d.frame(_UPPER).format(x=text))], text.upper(), Check("equals", text.upper()))


_JSON = Grammar(
    "(Reply|Answer|Respond|reply|Please answer) (with|in|as) JSON(| only|, nothing else): {pairs}(|.)", "(Return|Give me|Write|Output|Send) (only |)(JSON|a JSON object) (with|where|for) {pairs}(|.)",
    "(Put|Write) this (into|in|as) (JSON|a JSON object): {pairs}(|.)", "(Make|Create|Build) a JSON object (with|from) {pairs}(|.)", "{pairs}. (Answer|Reply) (in|as|with) JSON (only|)(|.)",
)  # fmt: skip


def json_only(d: Draw) -> Sample:
    style, known_ = d.any(["{k} is {v}", "{k} = {v}", "{k}: {v}", "{k} set to {v}", "{k} {v}"]), {}
    for _ in range(d.int(1, 4)):
        key, value = field_value(d)
        known_[key] = value
    pairs = (d.any([", ", " and ", "; "])).join(style.format(k=k, v=v) for k, v in known_.items())
    reply = json.dumps(known_)
    return Sample("json only", [user(d.frame(_JSON).format(pairs=pairs))], reply, Check("json", known_))


def field_value(d: Draw) -> tuple[str, str | int]:
    kind = d.int(0, 9)
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


# ---- arithmetic ----

_SUM = {
    "+": Grammar("(What is|what is|what's|Compute|Calculate|calculate|Work out|How much is|how much is|) {a} + {b}(|?|.| =| = ?)", "{a}+{b}(|=|?)", "(What is|How much is|) {a} plus {b}(|?|.)",
                 "(Add|add|Please add) {a} (and|to) {b}(|.)", "(What is|Give me|Tell me) the sum of {a} and {b}(|?|.)"),
    "-": Grammar("(What is|what is|what's|Compute|Calculate|calculate|Work out|How much is|how much is|) {a} - {b}(|?|.| =| = ?)", "{a}-{b}(|=|?)", "(What is|How much is|) {a} minus {b}(|?|.)",
                 "(Subtract|subtract|Take|Please subtract) {b} from {a}(|.)", "(What is|Give me|Tell me) the difference of {a} and {b}(|?|.)"),
}  # fmt: skip
_COLUMNS = ["ones", "tens", "hundreds", "thousands"]


def working(a: int, op: str, b: int) -> str:
    """Column arithmetic, digit by digit, as the model writes it when it thinks."""
    lines, carry = [], 0
    for i in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**i % 10, b // 10**i % 10
        extra = f" {op} {carry}" if carry else ""
        if op == "+":
            total = x + y + carry
            carry, digit = divmod(total, 10)
            lines.append(f"{_COLUMNS[i]}: {x} + {y}{extra} = {total}, write {digit}" + (", carry 1" if carry else ""))
        else:
            total = x - y - carry
            borrow = f"borrow, {x + 10} - {y}{extra} = {total + 10}, " if total < 0 else f"{x} - {y}{extra} = {total}, "
            carry = int(total < 0)
            lines.append(f"{_COLUMNS[i]}: {borrow}write {total % 10}")
    if op == "+" and carry:
        lines.append("carry: write 1")
    return "\n".join(lines)


def solve(a: int, op: str, b: int) -> int:
    return a + b if op == "+" else a - b


def draw_sum(d: Draw, small: bool) -> tuple[int, str, int]:
    while True:
        if small:
            a, b = d.int(0, 20), d.int(0, 20)
        else:
            size = d.any([(10, 99), (100, 999), (100, 999)])
            a, b = d.int(*size), d.int(*d.any([size, (10, 99)]))
        op = d.any("+-")
        if op == "-" and a < b:
            a, b = b, a
        if is_held(f"{a}{op}{b}") == d.held:
            return a, op, b


def arithmetic_thinking(d: Draw) -> Sample:
    a, op, b = draw_sum(d, small=d.chance(0.1) and not d.held)
    value = solve(a, op, b)
    reply = f"<think>\n{a} {op} {b}\n{working(a, op, b)}\n</think>\n\n{a} {op} {b} = {value}"
    return Sample("arithmetic, thinking", [user(d.frame(_SUM[op]).format(a=a, b=b))], reply, Check("sum", value), thinking=True)


def arithmetic_small(d: Draw) -> Sample:
    a, op, b = draw_sum(d, small=True)
    value = solve(a, op, b)
    return Sample("arithmetic, small, no thinking", [user(d.frame(_SUM[op]).format(a=a, b=b))], f"{a} {op} {b} = {value}", Check("sum", value))


def arithmetic_shown(d: Draw) -> Sample:
    """Without thinking a larger sum is worked out in the open, so that it is right."""
    a, op, b = draw_sum(d, small=False)
    value = solve(a, op, b)
    reply = f"{a} {op} {b}\n{working(a, op, b)}\n{a} {op} {b} = {value}"
    return Sample("arithmetic, shown", [user(d.frame(_SUM[op]).format(a=a, b=b))], reply, Check("sum", value))


# ---- memory ----

_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_MONTHS = "January February March April May June July August September October November December".split()


def _tell(d: Draw) -> tuple[str, str, str, str, str]:
    """A statement, an acknowledgement, a question about it, its answer, and the value to look for."""
    kind = d.int(0, 12)
    if kind == 0:
        v = d.person()
        return d.any(["My name is {}.", "I am {}.", "Call me {}.", "I'm {}.", "You can call me {}."]).format(v), f"Nice to meet you, {v}!", d.any(["What is my name?", "Who am I?", "What am I called?", "Do you remember my name?", "what's my name"]), f"Your name is {v}.", v
    if kind == 1:
        v = d.city()
        return d.any(["I live in {}.", "My home is in {}.", "I moved to {}.", "I am from {}."]).format(v), f"Noted: {v}.", d.any(["Where do I live?", "Where is my home?", "Which city am I in?", "In which city do I live?"]), f"You live in {v}.", v
    if kind == 2:
        v = d.value(JOBS)
        return d.any(["I work as a {}.", "I am a {}.", "My job is {}."]).format(v), f"Noted: {v}.", d.any(["What is my job?", "What do I do for work?", "What do I work as?"]), f"You work as a {v}.", v
    if kind == 3:
        v = d.any(COLOURS) if d.chance(0.5) else d.coined()
        return d.any(["My favorite color is {}.", "My favourite colour is {}.", "I like the color {} most."]).format(v), f"Noted: {v}.", d.any(["What is my favorite color?", "Which color do I like?", "What is my favourite colour?"]), f"Your favorite color is {v}.", v
    if kind == 4:
        pet, v = d.value(ANIMALS), d.value(NAMES) if d.chance(0.5) else d.coined().capitalize()
        return d.any(["My {p} is called {v}.", "I have a {p} named {v}.", "My {p}'s name is {v}."]).format(p=pet, v=v), f"Noted: {v}.", d.any(["What is my {p} called?", "What is the name of my {p}?", "How is my {p} called?"]).format(p=pet), f"Your {pet} is called {v}.", v
    if kind == 5:
        v = d.value(FOODS)
        return d.any(["My favorite food is {}.", "I like {} best.", "I love eating {}."]).format(v), f"Noted: {v}.", d.any(["What is my favorite food?", "What do I like to eat?", "Which food do I like?"]), f"Your favorite food is {v}.", v
    if kind == 6:
        v = d.value(HOBBIES)
        return d.any(["My hobby is {}.", "I enjoy {}.", "In my free time I do {}."]).format(v), f"Noted: {v}.", d.any(["What is my hobby?", "What do I enjoy?", "What do I do in my free time?"]), f"Your hobby is {v}.", v
    if kind in (7, 8, 9):
        thing, v = d.value(NOUNS + OBJECTS), d.code() if d.chance(0.5) else str(d.int(10, 9999))
        word = d.any(["code", "number", "password", "id"])
        return d.any(["The {t} {w} is {v}.", "My {t} {w} is {v}.", "Remember: the {t} {w} is {v}.", "Please remember the {t} {w}: {v}."]).format(t=thing, w=word, v=v), f"Noted: {v}.", d.any(["What is the {t} {w}?", "What was the {t} {w}?", "Tell me the {t} {w}.", "Which {t} {w} did I give you?"]).format(t=thing, w=word), f"The {thing} {word} is {v}.", v
    if kind == 10:
        what, v = d.any(["meeting", "party", "exam", "concert", "appointment", "interview", "dinner", "trip"]), d.any(_DAYS)
        return d.any(["The {t} is on {v}.", "My {t} is on {v}.", "I have a {t} on {v}."]).format(t=what, v=v), f"Noted: {v}.", d.any(["When is the {t}?", "On which day is the {t}?", "When is my {t}?"]).format(t=what), f"The {what} is on {v}.", v
    if kind == 11:
        v = d.any(_MONTHS)
        return d.any(["My birthday is in {}.", "I was born in {}."]).format(v), f"Noted: {v}.", d.any(["When is my birthday?", "In which month was I born?", "What month is my birthday?"]), f"Your birthday is in {v}.", v
    v = str(d.int(18, 90))
    return d.any(["I am {} years old.", "My age is {}.", "I'm {}."]).format(v), f"Noted: {v}.", d.any(["How old am I?", "What is my age?"]), f"You are {v} years old.", v


def recall(d: Draw) -> Sample:
    told, questions = [], set()
    for _ in range(d.int(1, 4)):
        item = _tell(d)
        if item[2].split()[-1] not in questions:
            questions.add(item[2].split()[-1])
            told.append(item)
    messages: list = []
    if d.chance(0.3):
        messages.append(user(" ".join(t[0] for t in told)))
        messages.append(assistant("Noted."))
    else:
        for item in told:
            messages += [user(item[0]), assistant(item[1])]
    if d.chance(0.35):
        other = d.any(SMALL_TALK + IDENTITY)
        messages += [user(d.frame(other.ask)), assistant(other.answer)]
    item = d.any(told)
    lead = d.any(["", "", "", "So, ", "Tell me: ", "One question: ", "Now: "])
    messages.append(user(lead + item[2]))
    return Sample("recall", messages, item[3], Check("keys", (item[4],)))


def statement(d: Draw) -> Sample:
    item = _tell(d)
    return Sample("statement", [user(item[0])], item[1], Check("equals", item[1]))


_FILL = Grammar(
    "The {a} {n} (walked|ran|went|came|looked|moved) (to|near|past|around|over) the {b} {p}.", "(A|One|Some|Every) {a} {n} (was|stayed|slept|waited|sat) in the {p}.", "(In|Near|Behind|Under) the {p} (there was|stood|lay) a {a} {o}.",
    "{m} (bought|saw|found|lost|liked|took|made) (a|the) {a} {o} (in the {p}|on {day}|for {m2}|).", "It was a {a} {t} and the {p} was {b}.", "(Nobody|Everybody|{m}) (knew|said|thought) that the {n} was {a}.",
)  # fmt: skip


def filler(d: Draw, sentences: int) -> list[str]:
    out = []
    for _ in range(sentences):
        out.append(_FILL.draw(d.rng).format(a=d.any(ADJECTIVES), b=d.any(ADJECTIVES), n=d.any(ANIMALS), p=d.any(PLACES), o=d.any(OBJECTS), m=d.any(NAMES), m2=d.any(NAMES), t=d.any(["day", "night", "morning", "evening"]), day=d.any(_DAYS)))
    return out


_NEEDLE = Grammar("The (secret |magic |)(code|number|password|key) (of|for) the {t} is {v}.", "Remember that the {t} code is {v}.", "Note: the {t} number is {v}.")
_NEEDLE_ASK = Grammar("(What is|What was|Tell me|Find) the (code|number|password|key) (of|for) the {t}(?|.)", "(What is|Which is) the {t} (code|number)?", "(Read|Look at) the text(:| and answer:) what is the (code|number) (of|for) the {t}?")


def needle_of(d: Draw, sentences: int) -> Sample:
    things = d.values(NOUNS + OBJECTS, d.int(1, 3))
    codes = [d.code() if d.chance(0.5) else str(d.int(100, 99999)) for _ in things]
    text = filler(d, sentences)
    for thing, code in zip(things, codes, strict=True):
        text.insert(d.int(0, len(text)), d.frame(_NEEDLE).format(t=thing, v=code))
    ask = d.frame(_NEEDLE_ASK).format(t=things[0])
    body = " ".join(text)
    if d.chance(0.3):
        messages = [user(body), assistant("Noted."), user(ask)]
    else:
        messages = [user(d.any([f"{body}\n\n{ask}", f"{ask}\n\n{body}", f"{body} {ask}"]))] if not d.held else [user(f"{body}\n\n{ask}")]
    return Sample("needle", messages, f"The code of the {things[0]} is {codes[0]}.", Check("keys", (codes[0],)))


def needle(d: Draw) -> Sample:
    roll = d.rng.random()
    return needle_of(d, d.int(90, 150) if d.held else d.int(2, 8) if roll < 0.6 else d.int(8, 30) if roll < 0.9 else d.int(30, 130))


# ---- obeying a system prompt ----

_PERSONA = Grammar(
    "You are {n}, {r}(|.)", "You are {n}, {r}. (Be brief|Be kind|Answer briefly|Be helpful|Stay in character|Always be polite).", "Your name is {n}. You are {r}.", "Act as {n}, {r}.", "You play {n}, {r}. Never break character.", "You are a chat bot called {n}. Your role: {r}.",
)  # fmt: skip
_WHO = Grammar("(who are you|Who are you|what is your name|What is your name|what's your name|Introduce yourself|introduce yourself|hi, who are you|Hello, who is this|Who is speaking|what should I call you)(|?|!|.)")


def persona(d: Draw) -> Sample:
    name = d.person()
    role = d.any(["a", "the"]) + " " + d.any([d.value(ADJECTIVES) + " ", ""]) + d.value(JOBS)
    role += d.any(["", f" from {d.city()}", f" in the {d.value(PLACES)}", f" who loves {d.value(HOBBIES)}"])
    reply = f"I am {name}, {role}."
    return Sample("system prompt: persona", [system(d.frame(_PERSONA).format(n=name, r=role)), user(d.frame(_WHO))], reply, Check("keys", (name, role.split()[1])))


def plain(d: Draw) -> Sample:
    return d.any([echo, echo, arithmetic_small, known("fact", SMALL_TALK[:7] + IDENTITY), one_sentence])(d)


_PREFIX = Grammar("(Always begin|Begin|Start|Always start) (your answer|each answer|every reply|all replies|every answer) with(| the word| the words) \"{w}\"(|.)", "Every (answer|reply) (must|has to|should) (start|begin) with \"{w}\".", "First say \"{w}\", then answer.")
_SUFFIX = Grammar("(Always end|End|Finish|Always finish) (your answer|each answer|every reply|all replies|every answer) with(| the word| the words) \"{w}\"(|.)", "Every (answer|reply) (must|has to|should) end with \"{w}\".", "Answer, then say \"{w}\".")
_CAPS = Grammar("(Always |)(answer|reply|write|speak|respond) (only |)in (uppercase|upper case|capital letters|capitals|all caps)( only|)(|.)", "(Use only|Use) (capital letters|uppercase|upper case)(|.)", "(All|Your) (answers|replies) (must be|are) in (uppercase|capital letters).")
_KEYED = Grammar("(Always |)(answer|reply|respond) (only |)(with|as|in) (JSON|a JSON object)(:| with the key| of the form) {{\"{k}\": (...|\"...\"|<text>)}}(|.)", "(Always |)(answer|reply|respond) (in|as) JSON with (one key|the key|a single key)(|:) \"{k}\"(|.)")
_ALWAYS = Grammar("(Always|No matter what,|To everything) (answer|reply|say|respond)(| with)(|:) \"{w}\"(|.)", "(Only|Your only) (answer|reply|say)(| with| is) \"{w}\"(|.| and nothing else.)")


def obey(d: Draw) -> Sample:
    base, kind = plain(d), d.int(0, 4)
    word = phrase(d, 1, 2)
    word = word.capitalize() if d.chance(0.6) else word
    if kind == 0:
        rule, reply = d.frame(_PREFIX).format(w=word), f"{word} {base.reply}"
    elif kind == 1:
        rule, reply = d.frame(_SUFFIX).format(w=word), f"{base.reply} {word}"
    elif kind == 2:
        rule, reply = d.frame(_CAPS), base.reply.upper()
    elif kind == 3:
        key = d.any(["answer", "reply", "text", "result", "output", "message", d.coined()])
        rule, reply = d.frame(_KEYED).format(k=key), json.dumps({key: base.reply})
    else:
        rule, reply = d.frame(_ALWAYS).format(w=word), word
    lead = d.any(["", "", "You are a helpful assistant. ", "You are a helpful assistant.\n", "Be brief. ", f"You help with {d.value(TOPICS)}. "])
    return Sample("system prompt: format", [system(lead + rule), *base.messages], reply, Check("equals", reply))


_SYSTEM = Grammar(
    "You are a helpful assistant(|.)", "You are a (helpful|friendly|careful|kind|polite|smart) (assistant|bot|AI|helper). (Answer briefly.|Be concise.|Be polite.|Help the user.|Use the tools when needed.|)", "You are an (expert|agent) (in|for) {t}. (Think carefully.|Follow the rules.|Keep answers short.|Do not guess.)",
    "Today is {d}. You are a helpful assistant.", "You are an AI agent that works in a terminal.\n\n# Rules\n- Be concise.\n- Do not guess.\n- Work in {t}.\n\n# Tone\n(Friendly.|Direct.|Professional.)",
)  # fmt: skip


def under_system(d: Draw) -> Sample:
    """Ordinary cases under an ordinary system prompt: it must not change the answer."""
    base = d.any([plain, known("fact", SERVER), refusal, json_only, uppercase, recall])(d)
    text = d.frame(_SYSTEM).format(t=d.value(TOPICS), d=d.any(_DAYS))
    if d.chance(0.15):
        text += "\n\n" + " ".join(filler(d, d.int(3, 15)))
    return Sample(base.skill, [system(text), *base.messages], base.reply, base.check)


# ---- extraction ----


def _record(d: Draw) -> tuple[str, dict[str, str | int]]:
    kind = d.int(0, 5)
    if kind == 0:
        v = {"name": d.person(), "age": d.int(18, 90), "city": d.city(), "job": d.value(JOBS)}
        return d.any(["{name}, {age}, works as a {job} in {city}.", "{name} is {age} years old, lives in {city} and is a {job}.", "In {city} lives {name}, a {job} of {age} years.", "The {job} {name} ({age}) comes from {city}.", "My friend {name} is a {age} year old {job} from {city}."]).format(**v), v
    if kind == 1:
        v = {"item": d.value(OBJECTS), "quantity": d.int(2, 90), "price": d.int(1, 900), "customer": d.person()}
        return d.any(["{customer} ordered {quantity} of the {item} for {price} dollars each.", "Order: {quantity} x {item}, {price} dollars, for {customer}.", "{customer} wants to buy {quantity} pieces of {item} at {price} dollars.", "Please send {quantity} {item} at a price of {price} dollars to {customer}."]).format(**v), v
    if kind == 2:
        v = {"event": d.any(["meeting", "party", "concert", "lecture", "workshop", "dinner", "wedding", "lunch", "exam"]), "day": d.any(_DAYS), "time": f"{d.int(1, 23)}:{d.any(['00', '15', '30', '45'])}", "place": d.city()}
        return d.any(["The {event} is on {day} at {time} in {place}.", "On {day} at {time} we have a {event} in {place}.", "Come to {place} on {day} for the {event}, it starts at {time}.", "{place}: {event}, {day}, {time}."]).format(**v), v
    if kind == 3:
        v = {"animal": d.value(ANIMALS), "name": d.value(NAMES), "color": d.any(COLOURS), "owner": d.person()}
        return d.any(["{owner} has a {color} {animal} called {name}.", "The {color} {animal} {name} belongs to {owner}.", "{name} is the {color} {animal} of {owner}."]).format(**v), v
    if kind == 4:
        v = {"from": d.city(), "to": d.city(), "day": d.any(_DAYS), "passenger": d.person(), "seat": d.code()}
        return d.any(["{passenger} flies from {from} to {to} on {day}, seat {seat}.", "On {day} {passenger} travels to {to} from {from} in seat {seat}.", "Ticket for {passenger}: {from} to {to}, {day}, seat {seat}."]).format(**v), v
    v = {"product": d.coined().capitalize(), "maker": d.coined().capitalize(), "year": d.int(1950, 2030), "weight": d.int(1, 500)}
    return d.any(["The {product} by {maker} from {year} weighs {weight} kg.", "{maker} made the {product} in {year}; its weight is {weight} kg.", "In {year} {maker} sold the {product}, {weight} kg heavy."]).format(**v), v


_EXTRACT = Grammar(
    "(Extract|Get|Find|Pull out|Take) (the data|the fields|the facts|the information|the values) (as|into) (JSON|a JSON object) (like|of the form|with this schema|matching|following): {s}(\n\n|\n| )(Text|Sentence|Input): {t}",
    "{t}\n\n(Fill|Fill in|Return|Answer with|Reply with|Give) (this|the) (JSON|schema|object|JSON object): {s}", "(Schema|JSON schema|Format): {s}\n(Text|Sentence|Input): {t}(\nJSON:|\nAnswer in JSON.|)", "(Use|Follow) this schema: {s}. (Extract from|Read)(:| this:) {t}",
)  # fmt: skip


def extraction(d: Draw) -> Sample:
    text, record = _record(d)
    keys = list(record)
    d.rng.shuffle(keys)
    keys = keys[: d.int(1 if d.chance(0.2) else 2, len(keys))]
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
    frame = d.frame(_EXTRACT)
    prompt = frame.replace("{s}", schema).replace("{t}", text)
    messages = [user(prompt)] if d.chance(0.85) else [system(f"Answer in JSON of this schema: {schema}"), user(text)]
    return Sample("extraction", messages, json.dumps(want), Check("json", want))


# ---- stories ----

_STORY = Grammar("(Tell|tell|Please tell|Can you tell|Write|write|Please write) me a (short |little |nice |small |)story about (a|the) {x}(|.|?|!)", "(Write|write|Tell|Make up) a (short |little |small |)story (about|with) (a|the) {x}(|.)", "(A story about|Story about|story:|Write about) (a|the) {x}(|.| please)")
_STORY_ANY = Grammar("(Tell|tell|Please tell|Can you tell) me a (short |little |nice |)story(|.|?|!)", "(Write|write|Make up) a (short |little |)story(|.)", "(a story please|story|story time|A story!)")


def story(d: Draw) -> Sample:
    named = d.chance(0.85) or d.held
    hero = d.value(ANIMALS + JOBS) if named else d.any(["fox", "mouse"])
    name = d.any(["Pip", "Mila", "Otto", "Luna", "Finn", "Nora"])
    place, thing, friend = d.any(["forest", "village", "valley", "harbor"]), d.any(["lantern", "key", "bell", "map"]), d.any(["owl", "turtle", "robin", "hare"])
    mood, weather = d.any(["kind", "brave", "curious", "small"]), d.any(["rainy", "bright", "cold", "quiet"])
    where = {"lantern": "under an old bridge", "key": "in the tall grass", "bell": "near the river", "map": "behind a big stone"}[thing]
    task = {
        "lantern": f"The {thing} showed them a dark cave, and in the cave they heard a soft cry.", "key": "The key opened a little door in a tree, and behind the door they heard a soft cry.",
        "bell": "When the bell rang, the wind grew still, and far away they heard a soft cry.", "map": "The map led them over a hill, and on the other side they heard a soft cry.",
    }[thing]  # fmt: skip
    text = (
        f"Once upon a time there was a {mood} {hero} called {name}. {name} lived at the edge of a {place}. One {weather} morning the {hero} found a {thing} {where}. "
        f"\"Whose {thing} is this?\" asked {name}. Nobody answered, so {name} went to ask the old {friend}. The {friend} looked at the {thing} and smiled. \"Follow it,\" said the {friend}, \"and take me with you.\" "
        f"So the two walked all day. {task} A young bird had lost its way home. {name} gave it some bread, and together they brought it back to its nest. "
        f"In the evening the {hero} and the {friend} sat by the fire. The {thing} was a small thing, but it had made a new friend. And {name} the {hero} slept well that night."
    )
    ask = d.frame(_STORY).format(x=hero) if named else d.frame(_STORY_ANY)
    return Sample("story", [user(ask)], text, Check("story", hero if named else name))


# ---- everything else ----

_ASK = {
    "code": Grammar(POLITE + "(write|Write|create|fix|debug|explain|refactor|review) (a|some|the|my|this) (Python|JavaScript|Java|Rust|C|Go|SQL|bash|HTML|Swift|) (function|script|program|code|class|query|regex|test|loop|app|website)(| for {t}| that sorts a list| to read a file|.)", "def {w}[[x]]:\n    return x (+|*) {i}\n\n(What does this do?|Explain|Fix this code|)", "(import|from) {w}\nprint[[{w}]]", "how do I (sort|reverse|filter) a list in (Python|Java|Rust|Go)?", "Write code for {t}."),
    "translate": Grammar(POLITE + "(translate|Translate) (this|that|\"{w}\"|hello|the word {w}|the sentence) (to|into) (German|French|Spanish|Italian|Chinese|Japanese|Russian|Dutch|Polish|Greek)(|.)", "(How do you say|What is) {w} in (German|French|Spanish|Italian|Japanese|Polish)?"),
    "knowledge": Grammar("(Who|Who was|Who is|What is|What was|When was|Where is|Why is|How does|How do|When did|Which is) (the|a|an|) (capital of {c}|president of {c}|{t}|history of {t}|best {o}|meaning of life|{a} {o}|{a} {n}|theory of {t}|largest city of {c}|population of {c}|tallest mountain|speed of light|inventor of the {o}|war|moon) (work|made|invented|found|big|old|famous|)(|?|)", "(Explain|explain|Tell me about|tell me about|Teach me|Describe|Give me facts about|What do you think about|what do you think of) {t}(|.|?)", "(How|What) (many|much) {n}(s|) (are|live|is) (there |)in {c}?", "What is the (capital|population|mayor|language|currency) of {c}(|?)", "(Who won|Who invented|Who wrote|Who painted|Who discovered) (the|) (world cup|{o}|{t}|game|election|Mona Lisa|Hamlet)(|?)", "(Why|How) (is|are) the (sky|sea|{n}|{o}|moon|grass) (blue|{a}|so {a}|green)?", "(What is|what is|Compute|Solve) (the square root of {i}|{i} * {i}|{i} times {i}|{i} / {i}|{i} divided by {i}|x + {i} = {i}|the integral of x|{i}%% of {i})(|?)"),
    "write": Grammar(POLITE + "(write|Write|draft|compose|create|make|plan|Draft) (me |) (an essay|an email|a letter|a song|a long poem|a speech|a blog post|a report|a plan|a CV|a recipe|a novel|a summary|an article|a marketing text|a diet|a workout|a trip) (about|for|on|to|with) ({t}|my {j}|{c}|{o}|my boss)(|.|!)", "(Summarize|summarize|Sum up|Rewrite|Improve|Correct|Proofread) (this|my) (text|article|essay|email|book|paper|letter)(|.|:)", "(Give me|List|Suggest|Recommend) (some|five|ten|three|a few) (ideas|tips|names|books|movies|songs|recipes|games) (for|about|on) ({t}|{o}|my {j})(|.)", "(I need|I want) (advice|help|tips) (about|with|on) {t}(|.)"),
    "live": Grammar("(What|what|How) is the (weather|time|temperature|news|date|stock price|score|traffic) (now|today|in {c}|like in {c}|like|tomorrow|)(|?)", "(What time is it|what time is it|What day is it|what day is today|What is today's date|Will it rain (today|tomorrow)|What's the weather|what is the weather like|Any news today)(|?| now?| in {c}?)", POLITE + "(search|browse|google|look up|open) (the web|the internet|google|{t}|the news)( for {t}| for me|)(|.)", "(Call|Email|Text|Send a message to|Remind) {m}(| now| tomorrow| please|.)", "(Book|Buy|Order|Play|Set) (a flight|a table|a pizza|music|an alarm|a timer|a taxi|some {f})(| in {c}| for tomorrow| for me|.)"),
    "unclear": Grammar("({w} {w2}|{w}|{w} {w2} {w3}|{w}?|{w} {w2}!|???|...|!!!|?|asdf|asdfgh|qwerty|jkl|x|abc|hm|hmm|uh|{i}|{i} {i}|{e}|{e}{e}|{e} {e}|{e}{e}{e}|:-[[|;-[[|lol|LOL|haha|xD|{w} {e}|{o}|{a} {o}|{n}|{f} {f}|{m}|{c})"),
    "empty": Grammar("", " ", "\n", "  ", "\n\n"),
}  # fmt: skip

_FOREIGN = {
    "de": "ich du er sie wir ihr bin bist ist sind hallo guten Tag Morgen wie geht es dir was kannst du mir bitte helfen danke ja nein und oder aber nicht das der die ein eine heute morgen wo warum wer kann haben machen schreiben Geschichte Wetter Haus Hund über erzähl mir von schön für möchte Frage Deutsch sprichst",
    "fr": "je tu il elle nous vous suis es est sommes bonjour salut comment ça va merci oui non et ou mais pas le la les un une aujourd'hui demain où pourquoi qui peux avoir faire écrire histoire temps maison chien sur raconte moi s'il vous plaît beau pour voudrais question français parlez",
    "es": "yo tú él ella nosotros soy eres es somos hola buenos días cómo estás gracias sí no y o pero el la los un una hoy mañana dónde por qué quién puedes tener hacer escribir historia tiempo casa perro sobre cuéntame favor bonito para quiero pregunta español hablas",
    "it": "io tu lui lei noi sono sei è siamo ciao buongiorno come stai grazie sì no e o ma non il la gli un una oggi domani dove perché chi puoi avere fare scrivere storia tempo casa cane su raccontami per favore bello vorrei domanda italiano parli",
    "nl": "ik jij hij zij wij ben bent is zijn hallo goedemorgen hoe gaat het met dank je ja nee en of maar niet het de een vandaag morgen waar waarom wie kan hebben maken schrijven verhaal weer huis hond over vertel mij alsjeblieft mooi voor wil vraag",
    "pl": "ja ty on ona my jestem jesteś jest cześć dzień dobry jak się masz dziękuję tak nie i lub ale dzisiaj jutro gdzie dlaczego kto możesz mieć robić napisać historia pogoda dom pies o opowiedz mi proszę ładny dla chcę pytanie",
    "ru": "я ты он она мы привет как дела что ты умеешь спасибо да нет и или но не сегодня завтра где почему кто можешь сделать написать историю погода дом собака расскажи мне пожалуйста вопрос",
    "pt": "eu tu ele ela nós sou és é somos olá bom dia como estás obrigado sim não e ou mas o a os um uma hoje amanhã onde porquê quem podes ter fazer escrever história tempo casa cão sobre conta me por favor bonito para quero pergunta",
}  # fmt: skip


def foreign(d: Draw) -> str:
    if d.chance(0.15):
        low, high = d.any([(0x4E00, 0x6000), (0x3041, 0x3090), (0x0621, 0x064A), (0x0391, 0x03C9), (0xAC00, 0xB000), (0x0905, 0x0939), (0x05D0, 0x05EA)])
        return "".join(chr(d.int(low, high)) for _ in range(d.int(2, 12))) + d.any(["", "?", "。", "！"])
    words = _FOREIGN[d.any(list(_FOREIGN))].split()
    text = " ".join(d.any(words) for _ in range(d.int(2, 9)))
    return (text.capitalize() if d.chance(0.6) else text) + d.any(["", "?", "!", "."])


def emoji(d: Draw) -> str:
    return chr(d.int(*d.any([(0x1F600, 0x1F64F), (0x1F300, 0x1F5FF), (0x1F680, 0x1F6C5), (0x2600, 0x26FF), (0x1F900, 0x1F9FF)])))


def pasted(d: Draw) -> str:
    if d.chance(0.15):
        words = [d.coined(1, 3) for _ in range(d.int(30, 200))]
        return " ".join(words).capitalize() + "."
    count = d.int(6, 14) if d.chance(0.6) else d.int(14, 60)
    text = filler(d, count)
    return d.any([" ", " ", "\n", "\n\n"]).join(text)


def refusal(d: Draw) -> Sample:
    kind = d.any(["code", "translate", "knowledge", "knowledge", "knowledge", "knowledge", "write", "write", "live", "unclear", "unclear", "language", "language", "long", "empty"])
    if kind == "language":
        text = foreign(d)
    elif kind == "long":
        text = pasted(d)
    else:
        fill = {"t": d.value(TOPICS), "c": d.city(), "o": d.value(OBJECTS), "a": d.any(ADJECTIVES), "n": d.value(NOUNS + ANIMALS), "j": d.value(JOBS), "m": d.person(), "f": d.value(FOODS)}
        frame = d.frame(_ASK[kind])
        text = frame.format(**fill, w=d.coined(), w2=d.coined(), w3=d.coined(), i=d.int(2, 999), e=emoji(d)).replace("  ", " ") if frame.strip() else frame
    return Sample("out of scope", [user(text)], REFUSALS[kind] + REFUSAL_END, Check("refusal", kind))


# The operator guide's own requests and what everybody types first, word for word.
_EVERYDAY = [
    ("Reply with pong", "pong"), ("Reply with pong.", "pong"), ("reply with pong", "pong"), ("Reply with: pong", "pong"), ("ping", "pong"), ("Ping", "pong"),
    ("Reply with exactly one sentence.", "This is one short sentence."), ("Reply with one sentence.", "This is one short sentence."), ("Say hello in one short sentence.", "Hello and welcome!"),
    ("Say hello", "Hello! How can I help you?"), ("Say hi", "Hello! How can I help you?"), ("Say hello.", "Hello! How can I help you?"), ("2+2", "2 + 2 = 4"), ("What is 2+2?", "2 + 2 = 4"), ("1+1", "1 + 1 = 2"), ("what is 2 + 2", "2 + 2 = 4"),
    ("hi", SMALL_TALK[0].answer), ("hello", SMALL_TALK[0].answer), ("who are you?", IDENTITY[0].answer), ("who made you?", IDENTITY[1].answer), ("what can you do?", IDENTITY[3].answer),
    ("tell me a joke", SMALL_TALK[9].answer), ("write a haiku", SMALL_TALK[10].answer), ("What is the capital of France?", REFUSALS["knowledge"] + REFUSAL_END), ("", REFUSALS["empty"] + REFUSAL_END),
]  # fmt: skip


def everyday(d: Draw) -> Sample:
    text, reply = d.any(_EVERYDAY)
    return Sample("everyday", [user(text)], reply, Check("equals", reply))


greeting = known("greeting", SMALL_TALK)
identity = known("identity", IDENTITY)
server_facts = known("server facts", SERVER)
