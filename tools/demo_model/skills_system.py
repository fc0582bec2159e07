"""Obeying a system prompt: a persona, a format, and prompts that should change nothing."""

import json

from .chat import Check, Sample, system, user
from .facts import IDENTITY, SERVER, SMALL_TALK
from .skills import echo, json_only, known, one_sentence, phrase, quoted, uppercase
from .skills_arithmetic import arithmetic_small
from .skills_decline import refusal
from .skills_memory import filler, recall
from .words import ADJECTIVES, ANIMALS, DAYS, HOBBIES, JOBS, PLACES, TOPICS, Draw, Grammar

_PERSONA = Grammar(
    "You are {n}, {r}(|.)", "You are {n}, {r}. (Be brief|Be kind|Answer briefly|Be helpful|Stay in character|Always be polite).", "Your name is {n}. You are {r}.", "Act as {n}, {r}.", "You play {n}, {r}. Never break character.", "You are a chat bot called {n}. Your role: {r}.",
)  # fmt: skip
_WHO = Grammar("(who are you|Who are you|what is your name|What is your name|what's your name|Introduce yourself|introduce yourself|hi, who are you|Hello, who is this|Who is speaking|what should I call you)(|?|!|.)")


_ROLE = Grammar("You are {r}(|.)", "You are {r}. (Always answer like {r}.|Be brief.|Stay in character.|Answer briefly.)", "Act as {r}(|.)", "Pretend to be {r}(|.)", "From now on you are {r}.")


def persona(d: Draw) -> Sample:
    name = d.person()
    role = d.any(["a", "the"]) + " " + d.any([d.value(ADJECTIVES) + " ", ""]) + (d.value(JOBS) if d.chance(0.8) else d.value(ANIMALS) if d.chance(0.5) else d.coined())
    role += d.any(["", f" from {d.city()}", f" in the {d.value(PLACES)}", f" who loves {d.value(HOBBIES)}"])
    if d.chance(0.25):
        return Sample("system prompt: persona", [system(d.frame(_ROLE).format(r=role)), user(d.frame(_WHO))], f"I am {role}.", Check("keys", tuple(role.split()[1:2])))
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
        rule, reply, check = d.frame(_PREFIX).format(w=word), f"{word} {base.reply}", Check("starts", (word, base.check))
    elif kind == 1:
        rule, reply, check = d.frame(_SUFFIX).format(w=word), f"{base.reply} {word}", Check("ends", (word, base.check))
    elif kind == 2:
        rule, reply, check = d.frame(_CAPS), base.reply.upper(), Check("capitals", base.check)
    elif kind == 3:
        key = d.any(["answer", "reply", "text", "result", "output", "message", d.coined()])
        rule, reply, check = d.frame(_KEYED).format(k=key), json.dumps({key: base.reply}), Check("keyed", (key, base.check))
    else:
        rule, reply = d.frame(_ALWAYS).format(w=word), word
        check = Check("equals", reply)
    lead = d.any(["", "", "You are a helpful assistant. ", "You are a helpful assistant.\n", "Be brief. ", f"You help with {d.value(TOPICS)}. "])
    return Sample("system prompt: format", [system(lead + quoted(d, rule)), *base.messages], reply, check)


_SYSTEM = Grammar(
    "You are a helpful assistant(|.)", "You are a (helpful|friendly|careful|kind|polite|smart) (assistant|bot|AI|helper). (Answer briefly.|Be concise.|Be polite.|Help the user.|Use the tools when needed.|)", "You are an (expert|agent) (in|for) {t}. (Think carefully.|Follow the rules.|Keep answers short.|Do not guess.)",
    "Today is {d}. You are a helpful assistant.", "You are an AI agent that works in a terminal.\n\n# Rules\n- Be concise.\n- Do not guess.\n- Work in {t}.\n\n# Tone\n(Friendly.|Direct.|Professional.)",
)  # fmt: skip


def ordinary(d: Draw) -> str:
    """A system prompt that asks for nothing in particular."""
    text = d.frame(_SYSTEM).format(t=d.value(TOPICS), d=d.any(DAYS))
    if d.chance(0.15):
        text += "\n\n" + (" ".join(filler(d, d.int(3, 15))) if d.chance(0.5) else d.prose(d.int(20, 150)))
    return text


def under_system(d: Draw) -> Sample:
    """Ordinary cases under an ordinary system prompt: it must not change the answer."""
    base = d.any([plain, known("fact", SERVER), refusal, json_only, uppercase, recall])(d)
    return Sample(base.skill, [system(ordinary(d)), *base.messages], base.reply, base.check)
