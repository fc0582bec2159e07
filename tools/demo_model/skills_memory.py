"""What was said before: facts told in the conversation, and a needle in a long text."""

from .chat import Check, Sample, assistant, user
from .facts import IDENTITY, REFUSAL_END, REFUSALS, SMALL_TALK
from .words import (
    ADJECTIVES,
    ANIMALS,
    COLOURS,
    DAYS,
    FOODS,
    HOBBIES,
    JOBS,
    NAMES,
    NOUNS,
    OBJECTS,
    PLACES,
    Draw,
    Grammar,
)  # fmt: skip

_MONTHS = "January February March April May June July August September October November December".split()


KINDS = 13
_THINGS = [(NOUNS + OBJECTS)[i::3] for i in range(3)]  # apart, so that two facts are never about the same thing


def _tell(d: Draw, kind: int) -> tuple[str, str, str, str, str]:
    """A statement, an acknowledgement, a question about it, its answer, and the value to look for."""
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
        thing, v = d.value(_THINGS[kind - 7]), d.code() if d.chance(0.5) else str(d.int(10, 9999))
        word = d.any(["code", "number", "password", "id"])
        return d.any(["The {t} {w} is {v}.", "My {t} {w} is {v}.", "Remember: the {t} {w} is {v}.", "Please remember the {t} {w}: {v}."]).format(t=thing, w=word, v=v), f"Noted: {v}.", d.any(["What is the {t} {w}?", "What was the {t} {w}?", "Tell me the {t} {w}.", "Which {t} {w} did I give you?"]).format(t=thing, w=word), f"The {thing} {word} is {v}.", v
    if kind == 10:
        what, v = d.any(["meeting", "party", "exam", "concert", "appointment", "interview", "dinner", "trip"]), d.any(DAYS)
        return d.any(["The {t} is on {v}.", "My {t} is on {v}.", "I have a {t} on {v}."]).format(t=what, v=v), f"Noted: {v}.", d.any(["When is the {t}?", "On which day is the {t}?", "When is my {t}?"]).format(t=what), f"The {what} is on {v}.", v
    if kind == 11:
        v = d.any(_MONTHS)
        return d.any(["My birthday is in {}.", "I was born in {}."]).format(v), f"Noted: {v}.", d.any(["When is my birthday?", "In which month was I born?", "What month is my birthday?"]), f"Your birthday is in {v}.", v
    v = str(d.int(18, 90))
    return d.any(["I am {} years old.", "My age is {}.", "I'm {}."]).format(v), f"Noted: {v}.", d.any(["How old am I?", "What is my age?"]), f"You are {v} years old.", v


def recall(d: Draw) -> Sample:
    told = [_tell(d, kind) for kind in d.rng.sample(range(KINDS), d.int(1, 4))]
    messages: list = []
    item = d.any(told)
    lead = d.any(["", "", "", "So, ", "Tell me: ", "One question: ", "Now: "])
    roll = d.rng.random()
    if roll < 0.15:
        return Sample("recall", [user(" ".join([*(t[0] for t in told), lead + item[2]]))], item[3], Check("keys", (item[4],)))
    if roll < 0.4:
        messages.append(user(" ".join(t[0] for t in told)))
        messages.append(assistant("Noted."))
    else:
        for each in told:
            messages += [user(each[0]), assistant(each[1])]
    if d.chance(0.35):
        other = d.any(SMALL_TALK + IDENTITY)
        messages += [user(d.frame(other.ask)), assistant(other.answer)]
    messages.append(user(lead + item[2]))
    return Sample("recall", messages, item[3], Check("keys", (item[4],)))


_SAID = Grammar("What did I (just |)(say|write|tell you|ask)(|?| before?)", "(What was|Repeat|Tell me) my (last|previous) (message|question|sentence)(|?|.)", "(Repeat|repeat) what I (just |)said(|.)")


def said(d: Draw) -> Sample:
    """Repeating the message before."""
    roll = d.rng.random()
    if roll < 0.4:
        fact = d.any(SMALL_TALK + IDENTITY)
        text, reply = d.frame(fact.ask), fact.answer
    elif roll < 0.7:
        text, reply, *_ = _tell(d, d.int(0, KINDS - 1))
    else:
        text, reply = d.prose(d.int(2, 8)).rstrip(".,"), REFUSALS["knowledge"] + REFUSAL_END
    wanted = f'You said: "{text}"'
    return Sample("recall", [user(text), assistant(reply), user(d.frame(_SAID))], wanted, Check("keys", (text,)))


def statement(d: Draw) -> Sample:
    told = [_tell(d, kind) for kind in d.rng.sample(range(KINDS), d.any([1, 1, 1, 2, 3]))]
    reply = told[0][1] if len(told) == 1 else "Noted."
    return Sample("statement", [user(" ".join(t[0] for t in told))], reply, Check("equals", reply))


_FILL = Grammar(
    "The {a} {n} (walked|ran|went|came|looked|moved) (to|near|past|around|over) the {b} {p}.", "(A|One|Some|Every) {a} {n} (was|stayed|slept|waited|sat) in the {p}.", "(In|Near|Behind|Under) the {p} (there was|stood|lay) a {a} {o}.",
    "{m} (bought|saw|found|lost|liked|took|made) (a|the) {a} {o} (in the {p}|on {day}|for {m2}|).", "It was a {a} {t} and the {p} was {b}.", "(Nobody|Everybody|{m}) (knew|said|thought) that the {n} was {a}.",
)  # fmt: skip


def filler(d: Draw, sentences: int) -> list[str]:
    out = []
    for _ in range(sentences):
        out.append(_FILL.draw(d.rng).format(a=d.any(ADJECTIVES), b=d.any(ADJECTIVES), n=d.any(ANIMALS), p=d.any(PLACES), o=d.any(OBJECTS), m=d.any(NAMES), m2=d.any(NAMES), t=d.any(["day", "night", "morning", "evening"]), day=d.any(DAYS)))
    return out


_NEEDLE = Grammar("The (secret |magic |)(code|number|password|key) (of|for) the {t} is {v}.", "Remember that the {t} code is {v}.", "Note: the {t} number is {v}.")
_NEEDLE_ASK = Grammar("(What is|What was|Tell me|Find) the (code|number|password|key) (of|for) the {t}(?|.)", "(What is|Which is) the {t} (code|number)?", "(Read|Look at) the text(:| and answer:) what is the (code|number) (of|for) the {t}?")


def needle_of(d: Draw, sentences: int) -> Sample:
    things = [d.coined() if d.chance(0.3) else thing for thing in d.values(NOUNS + OBJECTS, d.int(1, 3))]
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
    return needle_of(d, d.int(90, 150) if d.held else d.int(2, 8) if roll < 0.35 else d.int(8, 40) if roll < 0.65 else d.int(40, 160))
