"""Images drawn with Pillow, and questions about them. Fonts are Pillow's own, so the pictures are the same everywhere."""

import math
from dataclasses import dataclass, replace
from functools import cache

from PIL import Image, ImageDraw, ImageFilter, ImageFont

from .chat import Check, Sample, assistant, user
from .words import (
    ANIMALS,
    CITIES,
    COMMON,
    COUNT_WORDS,
    FOODS,
    NAMES,
    NOUNS,
    OBJECTS,
    PRINTED,
    VERBS,
    Draw,
    Grammar,
    is_held,
)

RGB = {
    "red": (220, 30, 30), "green": (30, 160, 50), "blue": (40, 70, 220), "yellow": (245, 220, 40), "orange": (250, 140, 20), "purple": (140, 40, 170),
    "pink": (250, 150, 190), "brown": (120, 70, 30), "black": (10, 10, 10), "white": (250, 250, 250), "gray": (130, 130, 130),
}  # fmt: skip
NEAR = {frozenset(p) for p in [("red", "orange"), ("red", "brown"), ("orange", "brown"), ("orange", "yellow"), ("pink", "white"), ("gray", "black"), ("red", "pink"), ("purple", "blue"), ("yellow", "white"), ("brown", "black"), ("gray", "white"), ("purple", "pink"), ("gray", "brown")]}
SHAPES = ["circle", "square", "triangle", "star", "rectangle", "diamond", "ring", "cross"]
PLACES = {(0, 0): "top left", (1, 0): "top", (2, 0): "top right", (0, 1): "left", (1, 1): "center", (2, 1): "right", (0, 2): "bottom left", (1, 2): "bottom", (2, 2): "bottom right"}  # fmt: skip


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str
    cell: tuple[int, int]


def canvas(d: Draw) -> tuple[int, int]:
    side = d.any([64, 96, 128, 160, 192, 224, 256, 256, 320, 384, 512])
    if d.chance(0.65):
        return side, side
    ratio = d.any([0.5, 0.66, 0.75, 1.33, 1.5, 2.0])
    return max(64, int(side * min(1.0, ratio))), max(64, int(side * min(1.0, 1 / ratio)))


def shade(d: Draw, colour: str) -> tuple[int, int, int]:
    r, g, b = (max(0, min(255, c + d.int(-12, 12))) for c in RGB[colour])
    return r, g, b


def colours(d: Draw, count: int) -> list[str]:
    """Colours that can be told apart, the background's first."""
    while True:
        picked = d.rng.sample(list(RGB), count)
        if not any(frozenset((a, b)) in NEAR for i, a in enumerate(picked) for b in picked[:i]):
            return picked


def paint(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill: tuple[int, int, int], turn: float, back: tuple[int, int, int], *, hollow: bool = False) -> None:
    if hollow and shape not in ("circle", "ring"):  # a hollow circle is a ring
        paint(draw, shape, x, y, r, fill, turn, back)
        return paint(draw, shape, x, y + (r * 0.06 if shape == "triangle" else 0), r * (0.6 if shape in ("star", "triangle", "cross") else 0.78), back, turn, back)
    def at(angle: float, length: float) -> tuple[float, float]:
        return x + length * math.cos(angle + turn), y + length * math.sin(angle + turn)

    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "ring":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        draw.ellipse((x - r * 0.55, y - r * 0.55, x + r * 0.55, y + r * 0.55), fill=back)
    elif shape == "square":
        draw.polygon([at(math.pi / 4 + i * math.pi / 2, r) for i in range(4)], fill=fill)
    elif shape == "diamond":
        draw.polygon([at(i * math.pi / 2, r if i % 2 else r * 0.62) for i in range(4)], fill=fill)
    elif shape == "rectangle":
        draw.polygon([(x - r, y - r * 0.45), (x + r, y - r * 0.45), (x + r, y + r * 0.45), (x - r, y + r * 0.45)], fill=fill)
    elif shape == "triangle":
        draw.polygon([at(-math.pi / 2 + i * 2 * math.pi / 3, r) for i in range(3)], fill=fill)
    elif shape == "star":
        draw.polygon([at(-math.pi / 2 + i * math.pi / 5, r if i % 2 == 0 else r * 0.42) for i in range(10)], fill=fill)
    else:
        for w, h in ((r, r * 0.3), (r * 0.3, r)):
            draw.rectangle((x - w, y - h, x + w, y + h), fill=fill)


def ground(d: Draw, size: tuple[int, int], back: tuple[int, int, int]) -> Image.Image:
    """A background: mostly plain, else a gentle slope of the colour or a grain."""
    image = Image.new("RGB", size, back)
    roll = d.rng.random()
    if roll < 0.15:
        r, g, b = (max(0, min(255, c + d.int(-25, 25))) for c in back)
        slope = Image.linear_gradient("L").resize(size)
        image.paste((r, g, b), (0, 0), slope if d.chance(0.5) else slope.transpose(Image.Transpose.ROTATE_180))
    elif roll < 0.25:
        grain = Image.frombytes("L", (64, 64), d.rng.randbytes(64 * 64)).resize(size).point(lambda v: v // 8)
        image.paste(tuple(min(255, c + 24) for c in back), (0, 0), grain)
    return image


def noise(d: Draw) -> Image.Image:
    """A picture of nothing in particular: grain, a blur of colours, stripes, scribbles."""
    size, kind = canvas(d), d.int(0, 4)
    if kind == 0:
        return Image.frombytes("RGB", (64, 64), d.rng.randbytes(64 * 64 * 3)).resize(size, d.any([Image.Resampling.NEAREST, Image.Resampling.BILINEAR]))
    if kind == 1:
        side = d.int(2, 6)
        return Image.frombytes("RGB", (side, side), d.rng.randbytes(side * side * 3)).resize(size, Image.Resampling.BICUBIC)
    image = Image.new("RGB", size, tuple(d.rng.randbytes(3)))
    draw = ImageDraw.Draw(image)
    for _ in range(d.int(12, 60)):
        x, y = d.int(-20, size[0]), d.int(-20, size[1])
        box, tint = (x, y, x + d.int(5, size[0]), y + d.int(5, size[1])), tuple(d.rng.randbytes(3))
        if kind == 2:
            draw.line(box, fill=tint, width=d.int(1, 5))
        elif kind == 3:
            draw.rectangle(box, fill=tint)
        else:
            draw.ellipse((x, y, x + d.int(4, 60), y + d.int(4, 60)), fill=tint)
    return image


def finish(d: Draw, image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(d.rng.uniform(0.3, 1.0))) if d.chance(0.08) else image


def scene(d: Draw, things: list[Thing], background: str, *, grid: int = 3, scale: float = 0.75) -> Image.Image:
    width, height = canvas(d)
    back = shade(d, background)
    image = ground(d, (width, height), back)
    draw = ImageDraw.Draw(image)
    cell_w, cell_h = width / grid, height / grid
    hollow = d.chance(0.08)
    for thing in things:
        r = min(cell_w, cell_h) / 2 * d.rng.uniform(scale, 0.98)
        x = (thing.cell[0] + 0.5) * cell_w + d.rng.uniform(-1, 1) * (cell_w / 2 - r) * 0.8
        y = (thing.cell[1] + 0.5) * cell_h + d.rng.uniform(-1, 1) * (cell_h / 2 - r) * 0.8
        paint(draw, thing.shape, x, y, r, shade(d, thing.colour), d.rng.uniform(-0.2, 0.2), back, hollow=hollow and r > 20)
    return finish(d, image)


def scattered(d: Draw, count: int, kind: str, tint: str, background: str) -> Image.Image:
    """Things of one kind anywhere, not in a grid, that do not touch."""
    width, height = canvas(d)
    back = shade(d, background)
    image = ground(d, (width, height), back)
    draw = ImageDraw.Draw(image)
    size = min(width, height)
    largest = size * min(0.3, 0.42 * (width * height / size**2 / max(count, 2)) ** 0.5)
    spots: list[tuple[float, float, float]] = []
    while len(spots) < count:
        r = largest * d.rng.uniform(0.45, 1.0)
        x, y = d.rng.uniform(r, width - r), d.rng.uniform(r, height - r)
        if all(math.hypot(x - a, y - b) > (r + c) * 1.08 for a, b, c in spots):
            spots.append((x, y, r))
        else:
            largest *= 0.98
    for x, y, r in spots:
        paint(draw, kind, x, y, r, shade(d, tint), d.rng.uniform(-0.2, 0.2), back)
    return finish(d, image)


def single(d: Draw) -> tuple[Thing, str, Image.Image]:
    """One big thing anywhere near the middle."""
    colour, background = colours(d, 2)
    thing = Thing(d.any(SHAPES), colour, (0, 0))
    return thing, background, scene(d, [thing], background, grid=1, scale=d.any([0.2, 0.45, 0.45]))


def sample(skill: str, text: str, reply: str, check: Check, *images: Image.Image) -> Sample:
    return Sample(f"image: {skill}", [user(text, len(images))], reply, check, images=list(images))


def an(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


_COLOUR = Grammar("(What|Which) (color|colour) is (the|this) {s}(|?)", "(Tell me|Name) the (color|colour) of the {s}(|.)", "(What is|What's) the (color|colour) of the {s}(|?)", "(Color|Colour) of the {s}?", "(What|Which) (color|colour) does the {s} have(|?)")
_GROUND = Grammar("(What|Which) (color|colour) is the background(|?)", "(What is|Tell me) the (color|colour) of the background(?|.)", "(What|Which) (color|colour) does the background have(|?)")


_PLAIN = Grammar("(What|Which) (color|colour) is (this|it|the image|this image|the picture|this picture)(|?)", "(What is|Tell me) the (color|colour) of (this|the) (image|picture)(?|.)")


def plain_picture(d: Draw) -> tuple[str, Image.Image]:
    tint = d.any(list(RGB))
    return tint, Image.new("RGB", canvas(d), shade(d, tint))


def colour(d: Draw) -> Sample:
    if d.chance(0.1):
        tint, image = plain_picture(d)
        return sample("colour", d.frame(_PLAIN), f"The image is {tint}.", Check("keys", (tint,)), image)
    thing, background, image = single(d)
    if d.chance(0.25):
        return sample("colour", d.frame(_GROUND), f"The background is {background}.", Check("keys", (background,)), image)
    if d.chance(0.4):
        first, second = d.rng.sample(SHAPES, 2)
        ground, c1, c2 = colours(d, 3)
        cells = d.rng.sample([(0, 0), (1, 0), (0, 1), (1, 1)], 2)
        image = scene(d, [Thing(first, c1, cells[0]), Thing(second, c2, cells[1])], ground, grid=2, scale=0.65)
        return sample("colour", d.frame(_COLOUR).format(s=first), f"The {first} is {c1}.", Check("keys", (c1,)), image)
    return sample("colour", d.frame(_COLOUR).format(s=d.any([thing.shape, "shape", "object"])), f"The {thing.shape} is {thing.colour}.", Check("keys", (thing.colour,)), image)


_SHAPE = Grammar("(What|Which) shape is (this|in the image|in the picture|shown|it|that)(|?)", "(Name|Tell me) the shape(|.| in the image.)", "(What|Which) shape do you see(|?)", "(What is|What's) (this|the) shape(|?)", "(What|Which) shape is the {c} (one|thing|object)(|?)")


def shape(d: Draw) -> Sample:
    thing, _, image = single(d)
    return sample("shape", d.frame(_SHAPE).format(c=thing.colour), f"It is {an(thing.shape)}.", Check("keys", (thing.shape,)), image)


_COUNT = Grammar("How many {s} (are there|do you see|are in the image|are in the picture|can you see|are shown)(|?)", "(Count|Please count) the {s}(|.| in the image.)", "(What is|Tell me) the number of {s}(|?|.)", "How many {s}(|?)")
_LIST = Grammar("(What|Which) shapes (do you see|are there|are shown|are in the image|can you see|are in the picture)(|?)", "(List|Name|Tell me) the shapes(|.| you see.| in the image.)")


def plural(kind: str) -> str:
    return kind + ("es" if kind == "cross" else "s")


def things_in(d: Draw, count: int, kind: str, tint: str) -> list[Thing]:
    cells = d.rng.sample([(x, y) for x in range(3) for y in range(3)], count)
    return [Thing(kind, tint, cell) for cell in cells]


def count(d: Draw) -> Sample:
    if d.chance(0.3):
        return count_mixed(d)
    number, kind = d.int(1, 6), d.any(SHAPES)
    background, tint = colours(d, 2)
    name = d.any([plural(kind), plural(kind), "shapes", "objects", "things"])
    image = scene(d, things_in(d, number, kind, tint), background) if d.chance(0.5) else scattered(d, number, kind, tint, background)
    noun = kind if number == 1 else plural(kind)
    return sample("count", d.frame(_COUNT).format(s=name), f"There {'is' if number == 1 else 'are'} {COUNT_WORDS[number]} {noun}.", Check("count", number), image)


def count_mixed(d: Draw) -> Sample:
    """Shapes of two or three kinds: how many of one kind, how many in all, or which."""
    kinds = d.rng.sample(SHAPES, d.int(2, 3))
    background, *tints = colours(d, 3)
    numbers = [d.int(1, 3 if len(kinds) == 2 else 2) for _ in kinds]
    cells = d.rng.sample([(x, y) for x in range(3) for y in range(3)], sum(numbers))
    things, total = [], sum(numbers)
    for i, (kind, number) in enumerate(zip(kinds, numbers, strict=True)):
        things += [Thing(kind, tints[i % 2], cells.pop()) for _ in range(number)]
    image = scene(d, things, background)
    if d.chance(0.25):  # the kinds in the order of SHAPES, so that there is one right answer
        order = [kind for kind in SHAPES if kind in kinds]
        said = [f"{COUNT_WORDS[n]} {kind if n == 1 else plural(kind)}" for kind in order for n in [numbers[kinds.index(kind)]]]
        return sample("count", d.frame(_LIST), "I see " + ", ".join(said[:-1]) + " and " + said[-1] + ".", Check("keys", tuple(order)), image)
    if d.chance(0.3):
        return sample("count", d.frame(_COUNT).format(s=d.any(["shapes", "objects", "things"])), f"There are {COUNT_WORDS[total]} shapes.", Check("count", total), image)
    kind, number = d.any(list(zip(kinds, numbers, strict=True)))
    return sample("count", d.frame(_COUNT).format(s=plural(kind)), f"There {'is' if number == 1 else 'are'} {COUNT_WORDS[number]} {kind if number == 1 else plural(kind)}.", Check("count", number), image)


_WHERE = Grammar("Where is the {s}(|?)", "(What is|Tell me) the position of the {s}(|?|.)", "(In which|Which) part of the (image|picture) (is|has) the {s}(|?)", "Where (in the image|in the picture) is the {s}(|?)", "Where do you see the {s}(|?)")


def position(d: Draw) -> Sample:
    background, tint, other = colours(d, 3)
    kind = d.any(SHAPES)
    cell = d.any(list(PLACES))
    things = [Thing(kind, tint, cell)]
    if d.chance(0.5):
        far = d.any([c for c in PLACES if c != cell])
        things.append(Thing(d.any([s for s in SHAPES if s != kind]), other, far))
    name = d.any([kind, f"{tint} {kind}", f"{tint} shape"] + (["shape"] if len(things) == 1 else []))
    place = PLACES[cell]
    return sample("position", d.frame(_WHERE).format(s=name), f"The {kind} is at the {place}.", Check("place", place), scene(d, things, background))


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    found = ImageFont.load_default(size=size)
    assert isinstance(found, ImageFont.FreeTypeFont)
    return found


def printed(d: Draw, text: str) -> tuple[Image.Image, str, str]:
    """`text` in one line, in Pillow's font: thin or bold, narrow or wide, level or a little turned, large enough to read."""
    width, height = canvas(d)
    height = max(height, 64)
    width = max(width, 96, height // 2)
    background, tint = colours(d, 2)
    image = ground(d, (width, height), shade(d, background))
    bold = d.any([0, 0, 0, 1, 2])
    mask_font = font(64)
    left, top, right, bottom = mask_font.getbbox(text, stroke_width=bold)
    mask = Image.new("L", (int(right - left) + 4, int(bottom - top) + 4))
    ImageDraw.Draw(mask).text((2 - left, 2 - top), text, fill=255, font=mask_font, stroke_width=bold)
    if d.chance(0.25):
        mask = mask.rotate(d.rng.uniform(-8, 8), Image.Resampling.BICUBIC, expand=True)
    stretch = d.rng.uniform(0.75, 1.3) if d.chance(0.4) else 1.0
    limit = d.rng.uniform(0.6, 0.94)
    fit = min(width * limit / (mask.width * stretch), height * limit / mask.height)
    fit *= 1.0 if d.chance(0.6) else d.rng.uniform(min(1.0, max(0.5, 11 / (mask.height * fit))), 1.0)
    mask = mask.resize((max(4, int(mask.width * stretch * fit)), max(4, int(mask.height * fit))), Image.Resampling.BILINEAR, reducing_gap=2.0)
    x, y = d.int(0, max(0, width - mask.width)), d.int(0, max(0, height - mask.height))
    image.paste(shade(d, tint), (x, y), mask)
    return finish(d, image), background, tint


_PRINT = [COMMON, NOUNS, OBJECTS, ANIMALS, FOODS, NAMES, CITIES, VERBS]


def word_to_print(d: Draw) -> str:
    """A short word: a usual sign, an everyday word, or one that means nothing, in capitals or not."""
    while True:
        roll = d.rng.random()
        word = d.value(PRINTED) if roll < 0.25 else d.value(d.any(_PRINT)) if roll < 0.65 else d.coined(1, 2)
        if 2 <= len(word) <= 8:
            break
    if len(word) <= 4 and d.chance(0.12):
        word += " " + (d.value(PRINTED) if d.chance(0.7) else str(d.int(1, 99)))
    return d.any([word.upper(), word.upper(), word.upper(), word.capitalize(), word.lower()])


def number_to_print(d: Draw) -> str:
    while True:
        number = str(d.int(0, 9)) if d.chance(0.15) else str(d.int(10, 99)) if d.chance(0.45) else str(d.int(100, 999)) if d.chance(0.7) else str(d.int(1000, 9999))
        if len(number) == 1 or is_held(number) == d.held:
            return number


_READ = Grammar("(What does|What is|Which word does) (the|this) (sign|image|picture|text) (say|show|read)(|?)", "(Read|Tell me) the (word|text)(|.| in the image.)", "(What|Which) (word|text) (is|do you see) (shown|written|printed|in the image|in the picture|here)(|?)", "(What is|What's) written (here|in the image|on the sign|in the picture)(|?)", "(Read|Transcribe) (this|the image|the sign)(|.)")
_NUMBER = Grammar("(What|Which) number (is shown|do you see|is this|is written|is in the image|is printed)(|?)", "(Read|Tell me) the number(|.| in the image.)", "(What is|What's) the number(|?)")


def words(d: Draw) -> Sample:
    word = word_to_print(d)
    image, _, _ = printed(d, word)
    return replace(sample("printed word", d.frame(_READ), f'The text is "{word}".', Check("keys", (word,)), image), spelled=word)


def numbers(d: Draw) -> Sample:
    number = number_to_print(d)
    image, _, _ = printed(d, number)
    text = d.frame(_NUMBER if d.chance(0.8) else _READ)
    reply = f"The number is {number}." if "number" in text else f'The text is "{number}".'
    return sample("printed number", text, reply, Check("sum", int(number)), image)


_DESCRIBE = Grammar("(Describe|describe|Please describe) (the|this) (image|picture|photo) (in one short sentence|in one sentence|in a sentence|briefly|)(|.)", "(What is|What's|What do you see) in (the|this) (image|picture)(|?)", "(What do you see|What can you see|What is this|What is shown)(|?)", "(Caption|Caption this|Give a caption for) (the |this |)(image|picture)(|.)", "Tell me what you see(|.)")


def caption(d: Draw) -> tuple[str, tuple[str, ...], Image.Image, str]:
    """What is seen, the words that must be said, the picture, and what of it is spelled."""
    roll = d.rng.random()
    if roll < 0.05:
        tint, image = plain_picture(d)
        return f"a plain {tint} image", (tint,), image, ""
    if roll < 0.5:
        thing, background, image = single(d)
        return f"{an(thing.colour)} {thing.shape} on {an(background)} background", (thing.colour, thing.shape, background), image, ""
    if roll < 0.7:
        number, kind = d.int(2, 5), d.any(SHAPES)
        background, tint = colours(d, 2)
        many = kind + ("es" if kind == "cross" else "s")
        image = scene(d, things_in(d, number, kind, tint), background) if d.chance(0.5) else scattered(d, number, kind, tint, background)
        return f"{COUNT_WORDS[number]} {tint} {many} on {an(background)} background", (COUNT_WORDS[number], tint, kind, background), image, ""
    if roll < 0.85:
        background, c1, c2 = colours(d, 3)
        (first, second), row = d.rng.sample(SHAPES, 2), d.int(0, 1)
        image = scene(d, [Thing(first, c1, (0, row)), Thing(second, c2, (1, row))], background, grid=2, scale=0.65)
        return f"{an(c1)} {first} and {an(c2)} {second} on {an(background)} background", (c1, first, c2, second, background), image, ""
    word = word_to_print(d)
    image, background, tint = printed(d, word)
    return f'the word "{word}" in {tint} on {an(background)} background', (word, tint, background), image, word


NOTHING = "I see no simple shape and no text in this image."


def unclear(d: Draw) -> Sample:
    """A picture of nothing the model knows; it should say so and not guess."""
    ask = d.any([_DESCRIBE, _DESCRIBE, _SHAPE, _READ, _LIST])
    return sample("description", d.frame(ask).format(c="big"), NOTHING, Check("keys", ("no simple shape",)), noise(d))


def describe(d: Draw) -> Sample:
    if d.chance(0.06):
        return unclear(d)
    text, keys, image, word = caption(d)
    return replace(sample("description", d.frame(_DESCRIBE), text[0].upper() + text[1:] + ".", Check("keys", keys), image), spelled=word)


_COMPARE = Grammar("(What is the difference between|Compare) (the|these) (two |)(images|pictures)(|.|?)", "(How do|In what way do) (the|these) (two |)(images|pictures) differ(|?)", "(Describe|What is in) (both|the two) (images|pictures)(|?|.)")
_SAME = Grammar("(Are|Do) (the|these) (two |)(images|pictures) (the same|show the same shape|equal)(|?)", "(Is it|Is this) the same (shape|thing) (in both|in both images|in the two images)(|?)")
_WHICH = Grammar("Which (image|picture|one|of these|of the two) (is|shows|has|contains) (the|a) {x}(|?)", "(In which|Where|In which image|In which picture) (is|do you see) the {x}(|?)", "Is the {x} in the first or the second (image|picture)(|?)")
_MORE = Grammar("Which (image|picture) (has|shows) more (shapes|objects|things)(|?)", "In which (image|picture) are there more (shapes|objects|things)(|?)")


def compare(d: Draw) -> Sample:
    roll = d.rng.random()
    if roll < 0.5:
        (a, _, one), (b, _, two) = single(d), single(d)
        first, second = f"{an(a.colour)} {a.shape}", f"{an(b.colour)} {b.shape}"
        return sample("two images", d.frame(_COMPARE), f"The first image shows {first}, the second {second}.", Check("ordered", (f"{a.colour} {a.shape}", f"{b.colour} {b.shape}")), one, two)
    if roll < 0.7:
        (a, _, one), (b, _, two) = single(d), single(d)
        if a.shape != b.shape and a.colour != b.colour and frozenset((a.colour, b.colour)) not in NEAR:
            word, thing = d.any([("first", a), ("second", b)])
            what = d.any([thing.shape, f"{thing.colour} shape", f"{thing.colour} {thing.shape}", f"{thing.colour} one"])
            return sample("two images", d.frame(_WHICH).format(x=what), f"The {word} image.", Check("keys", (word,)), one, two)
    if roll < 0.85:
        a, _, one = single(d)
        b, _, two = single(d)
        if d.chance(0.5):
            background, tint = colours(d, 2)
            b = Thing(a.shape, tint, (0, 0))
            two = scene(d, [b], background, grid=1, scale=0.45)
        same = a.shape == b.shape
        reply = f"Yes, both show {an(a.shape)}." if same else f"No, the first shows {an(a.shape)}, the second {an(b.shape)}."
        return sample("two images", d.frame(_SAME), reply, Check("keys", ("Yes" if same else "No",)), one, two)
    n, m = d.rng.sample(range(1, 7), 2)
    pictures = []
    for number in (n, m):
        background, tint = colours(d, 2)
        pictures.append(scene(d, things_in(d, number, d.any(SHAPES), tint), background))
    winner = "first" if n > m else "second"
    reply = f"The {winner} image: {COUNT_WORDS[max(n, m)]} against {COUNT_WORDS[min(n, m)]}."
    return sample("two images", d.frame(_MORE), reply, Check("keys", (winner,)), *pictures)


def again(d: Draw) -> Sample:
    """Several questions about one picture, a turn each."""
    thing, background, image = single(d)
    name = d.any([thing.shape, "shape", "object"])
    turns = [
        (d.frame(_COLOUR).format(s=name), f"The {thing.shape} is {thing.colour}.", (thing.colour,)),
        (d.frame(_SHAPE).format(c=thing.colour), f"It is {an(thing.shape)}.", (thing.shape,)),
        (d.frame(_GROUND), f"The background is {background}.", (background,)),
        (d.frame(_DESCRIBE), f"{an(thing.colour).capitalize()} {thing.shape} on {an(background)} background.", (thing.colour, thing.shape, background)),
    ]
    d.rng.shuffle(turns)
    turns = turns[: d.int(2, 3)]
    lead = d.any(["", "And ", "and ", "Now, "])
    messages = [user(turns[0][0], 1)]
    for (_, reply, _), (ask, _, _) in zip(turns, turns[1:], strict=False):
        messages += [assistant(reply), user(lead + ask if lead else ask)]
    return Sample("image: several questions", messages, turns[-1][1], Check("keys", turns[-1][2]), images=[image])
