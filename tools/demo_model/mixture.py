"""How much of each skill the training sees, and the corpus the tokenizer is built from."""

from collections.abc import Iterator
from dataclasses import replace

from . import skills as s
from . import skills_arithmetic as sums
from . import skills_decline as decline
from . import skills_images as i
from . import skills_memory as recalling
from . import skills_system as system
from . import skills_tools as t
from .chat import Sample, assistant
from .chat import system as system_message
from .skills import Skill
from .words import Draw

TEXT: list[tuple[float, Skill]] = [
    (3, s.everyday), (4, s.greeting), (5, s.identity), (10, s.server_facts), (11, s.echo), (3, s.drill), (4, s.one_sentence), (9, s.uppercase), (6, s.json_only),
    (7, sums.arithmetic_thinking), (7, sums.arithmetic_small), (5, sums.arithmetic_shown), (8, recalling.recall), (2, recalling.said), (2, recalling.statement), (6, recalling.needle),
    (5, system.persona), (9, system.obey), (5, system.under_system), (8, s.extraction), (2, s.story), (12, decline.refusal),
    (18, t.one_call), (13, t.two_calls), (8, t.no_call), (5, t.use_result),
]  # fmt: skip
IMAGE: list[tuple[float, Skill]] = [
    (5, i.colour), (4, i.shape), (7, i.count), (8, i.position), (8, i.words), (4, i.numbers), (7, i.describe), (6, i.compare), (4, i.again),
]  # fmt: skip
POOL = TEXT + IMAGE

# What the model thinks before it answers when thinking is on, where the case itself brings no reasoning.
THOUGHTS = {
    "greeting": "This is small talk. I answer in a friendly way.", "identity": "The question is about me.", "server facts": "The question is about the server. I know this.",
    "reply with": "I repeat what I was told.", "one sentence": "One sentence is enough.", "uppercase": "I write the words in capital letters.", "json only": "I answer with JSON only.",
    "recall": "I was told this before.", "needle": "I look for it in the text.", "system prompt: persona": "The system prompt says who I am.", "system prompt: format": "The system prompt says how to answer.",
    "extraction": "I fill the fields from the text.", "tool call": "A tool can do this.", "two tool calls": "This takes two calls.", "no tool call": "No tool is needed.", "tool result": "The tool has answered.",
    "story": "I tell a short story.", "out of scope": "I cannot do this.",
}  # fmt: skip


def draw(d: Draw, image_share: float) -> tuple[Sample, int]:
    """A case and the place of its skill in `POOL`."""
    pictures = d.chance(image_share)
    low, high = (len(TEXT), len(POOL)) if pictures else (0, len(TEXT))
    (place,) = d.rng.choices(range(low, high), [w for w, _ in POOL[low:high]])
    sample = POOL[place][1](d)
    if d.chance(0.12):
        sample = later(d, sample)
    if sample.thinking is None and not sample.skill.startswith("arithmetic") and d.chance(0.07):
        thought = "I look at the image." if sample.images else THOUGHTS.get(sample.skill, "This is easy.")
        sample = replace(sample, thinking=True, reply=f"<think>\n{thought}\n</think>\n\n{sample.reply}")
    return (capped(d, sample) if sample.thinking and d.chance(0.08) else sample), place


def capped(d: Draw, sample: Sample) -> Sample:
    """The same case where a server ended the reasoning early: the answer follows, and a sum is then worked out in it."""
    thought, _, answer = sample.reply.removeprefix("<think>\n").partition("\n</think>\n\n")
    cut = thought[: d.int(0, len(thought))]
    if len(cut) < len(thought) and sample.skill.startswith("arithmetic") and thought.count("\n") > 1:
        answer = f"{thought}\n{answer}"
    return replace(sample, begun=f"<think>\n{cut}\n</think>\n\n", reply=answer)


def later(d: Draw, sample: Sample) -> Sample:
    """The same case under a system prompt, or further on in a conversation, which may have been about a picture."""
    first = sample.messages[0]
    if first["role"] == "system":
        return sample
    before = []
    if d.chance(0.4):
        before.append(system_message(system.ordinary(d)))
    for _ in range(d.int(0 if before else 1, 2)):
        earlier = d.any([s.greeting, s.identity, s.server_facts, s.echo, sums.arithmetic_small, decline.refusal, s.one_sentence])(d)
        before += [*earlier.messages, assistant(earlier.reply)]
    pictures = []
    if d.chance(0.15):
        seen = d.any([i.colour, i.shape, i.count, i.describe, i.words])(d)
        before += [*seen.messages, assistant(seen.reply)]
        pictures = seen.images
    return replace(sample, messages=[*before, *sample.messages], images=[*pictures, *sample.images])


def corpus(seed: int, count: int) -> Iterator[str]:
    d = Draw(f"corpus {seed}")
    for _ in range(count):
        sample, _ = draw(d, 0.1)
        for message in sample.messages:
            content = message["content"]
            yield content if isinstance(content, str) else content[-1]["text"]
        yield sample.reply
