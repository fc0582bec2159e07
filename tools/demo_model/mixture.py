"""How much of each skill the training sees, and the corpus the tokenizer is built from."""

from collections.abc import Iterator

from . import skills as s
from . import skills_arithmetic as sums
from . import skills_decline as decline
from . import skills_images as i
from . import skills_memory as recalling
from . import skills_system as system
from . import skills_tools as t
from .chat import Sample
from .skills import Skill
from .words import Draw

TEXT: list[tuple[float, Skill]] = [
    (3, s.everyday), (4, s.greeting), (5, s.identity), (10, s.server_facts), (12, s.echo), (4, s.one_sentence), (7, s.uppercase), (7, s.json_only),
    (8, sums.arithmetic_thinking), (5, sums.arithmetic_small), (3, sums.arithmetic_shown), (9, recalling.recall), (2, recalling.statement), (3, recalling.needle),
    (4, system.persona), (7, system.obey), (4, system.under_system), (9, s.extraction), (2, s.story), (9, decline.refusal),
    (12, t.one_call), (6, t.two_calls), (6, t.no_call), (5, t.use_result),
]  # fmt: skip
IMAGE: list[tuple[float, Skill]] = [
    (8, i.colour), (5, i.shape), (4, i.count), (4, i.position), (2, i.words), (2, i.numbers), (5, i.describe), (2, i.compare),
]  # fmt: skip


def draw(d: Draw, image_share: float) -> Sample:
    pool = IMAGE if d.chance(image_share) else TEXT
    (skill,) = d.rng.choices([f for _, f in pool], [w for w, _ in pool])
    return skill(d)


def corpus(seed: int, count: int) -> Iterator[str]:
    d = Draw(f"corpus {seed}")
    for _ in range(count):
        sample = draw(d, 0.1)
        for message in sample.messages:
            content = message["content"]
            yield content if isinstance(content, str) else content[-1]["text"]
        yield sample.reply
