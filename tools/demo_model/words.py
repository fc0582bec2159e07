"""Word pools of the synthetic data and the held-out split: a value is held out by its own hash, so no list is kept twice."""

import json
import random
import zlib
from collections.abc import Sequence
from functools import cache
from typing import TypeVar

from .place import DEMO

T = TypeVar("T")

NAMES = """Alice Bob Carla David Emma Frank Grace Henry Irene Jack Karen Liam Maria Nina Oscar Paula Quentin Rosa Sam Tina Uma Victor
Wendy Xavier Yara Zoe Adam Bella Chloe Daniel Elena Felix Gina Hugo Ivan Julia Kevin Laura Marco Nora Oliver Petra Ralph Sofia Tom Ursula
Vera Walter Yusuf Zara Amir Beatriz Cyrus Diana Ethan Fatima George Hana Ines Jonas Kira Leo Mila Noah Olga Pedro Rita Simon Theo Anita
Boris Celia Dario Edith Fiona Gavin Helen Igor Joan Kofi Lena Mateo Naomi Otto Priya Rafael Stella Tariq Viola Wanda Yuri Agnes Bruno
Clara Dmitri Elsa Farid Greta Hector Isla Jorge Katya Lars Mona Nadia Omar Pablo Ruth Selma Tomas Vince Willa Ada Ben Cora Dan Eve Finn
Gwen Hal Ida Jim Kay Lou Max Ned Orla Pam Rex Sue Ted Val Zed Hiro Kenji Mei Wei Lin Aiko Ravi Anil Sunil Leila Samir Karim Aisha Zainab
Chidi Amara Kwame Abena Tunde Ngozi Lucia Diego Carmen Javier Pilar Anders Bjorn Astrid Ingrid Sven Freya""".split()

SURNAMES = """Smith Jones Brown Miller Davis Garcia Wilson Moore Taylor Thomas White Harris Clark Lewis Walker Hall Young King Wright Scott
Green Baker Adams Nelson Hill Rivera Campbell Mitchell Carter Roberts Turner Phillips Parker Evans Edwards Collins Stewart Morris Rogers
Cook Morgan Bell Murphy Bailey Cooper Cox Ward Gray James Watson Brooks Kelly Sanders Price Bennett Wood Barnes Ross Henderson Coleman
Novak Silva Rossi Weber Fischer Meyer Dubois Larsen Kowalski Tanaka Sato Kim Chen Patel Singh Khan Okafor Mensah Costa Ferrari""".split()

CITIES = """Paris London Berlin Madrid Rome Vienna Prague Lisbon Dublin Oslo Stockholm Helsinki Warsaw Budapest Athens Zurich Geneva Milan
Naples Munich Hamburg Cologne Lyon Seville Porto Cairo Nairobi Lagos Accra Tunis Dakar Boston Chicago Denver Seattle Houston Miami Dallas
Austin Phoenix Portland Toronto Montreal Vancouver Mexico Lima Bogota Quito Santiago Havana Tokyo Osaka Kyoto Seoul Beijing Shanghai Delhi
Mumbai Chennai Dhaka Bangkok Hanoi Manila Jakarta Sydney Perth Auckland Dubai Doha Tehran Baghdad Ankara Istanbul Moscow Kyiv Riga Tallinn
Vilnius Minsk Sofia Zagreb Belgrade Turin Ghent Utrecht Leeds Bristol Cardiff Glasgow Basel Bern Graz Linz Krakow Brno Malmo Bergen""".split()

ANIMALS = """cat dog fox owl bear wolf deer hare mouse frog duck goose horse cow pig sheep goat hen crow eagle hawk swan otter beaver badger
rabbit squirrel turtle snake lizard whale shark seal crab bee ant spider moth tiger lion zebra camel monkey panda koala parrot penguin
hedgehog donkey pony lamb rat bat raven robin sparrow dolphin octopus snail""".split()

FOODS = """apple pear plum grape lemon lime mango peach cherry banana orange melon carrot potato tomato onion pepper bean pea corn rice bread
cheese butter milk cream egg soup salad pasta pizza cake pie cookie honey jam sugar salt tea coffee juice water fish chicken beef noodle
pancake waffle yogurt garlic spinach mushroom olive walnut almond""".split()

OBJECTS = """book pen cup lamp chair table desk clock key door window box bag hat coat shoe sock glove scarf ring coin map phone radio camera
guitar piano drum violin ball kite bike car boat train plane ship wagon ladder hammer nail saw rope bucket basket bottle plate bowl spoon
fork knife candle mirror pillow blanket umbrella letter ticket badge brush comb towel soap bell whistle lantern compass telescope magnet
battery cable screen keyboard notebook pencil ruler eraser wallet backpack tent""".split()

COLOURS = ["red", "green", "blue", "yellow", "orange", "purple", "pink", "brown", "black", "white", "gray", "cyan"]

ADJECTIVES = """big small old new tall short long quick slow warm cold bright dark quiet loud soft hard clean happy sad brave kind clever
gentle proud lazy busy calm wild tiny huge rich poor strong weak light heavy sweet bitter fresh dry wet round flat smooth rough shiny dusty
golden silver wooden ancient modern hidden lost secret friendly curious patient honest funny sleepy hungry thirsty lucky careful""".split()

JOBS = """teacher doctor nurse baker farmer pilot sailor painter writer singer dancer driver builder carpenter plumber chef waiter lawyer
judge banker clerk gardener fisher hunter soldier guard engineer scientist librarian tailor barber miner potter weaver astronomer captain
detective gardener mechanic photographer reporter surgeon""".split()

HOBBIES = """chess painting reading running swimming cycling hiking fishing cooking baking singing dancing sailing skating skiing climbing
gardening knitting sewing drawing writing photography astronomy pottery tennis football hockey rugby golf boxing yoga archery""".split()

PLACES = """forest river mountain valley village castle garden harbor island desert meadow lake beach bridge tower library market school
museum station cave field farm mill hill cottage kitchen attic cellar street park""".split()

TOPICS = """history music physics chemistry biology football politics gardening poetry economics philosophy geography medicine cooking
astronomy law fashion movies novels travel finance marketing psychology religion sports art architecture statistics geometry algebra
mathematics grammar painting theatre volcanoes dinosaurs oceans planets robots castles pirates vikings knights""".split()

VERBS = """open close start stop send read write find show list get set add remove create delete update check count move copy search play
pause book order cancel track translate convert turn lock unlock save load share print scan call measure compare sort""".split()

NOUNS = """user order ticket invoice payment account message email file folder note task event meeting reminder alarm timer song playlist
video photo image report chart table price stock weather forecast news article recipe product customer contact address route flight hotel
room seat device sensor light door thermostat server log record score game player team match language text word currency unit temperature
distance speed weight size password code key tag comment review rating package shipment warehouse calendar""".split()

COMMON = """the a an and or but if then so because when while where who what which how why is are was were be been am do does did have has
had will would can could should may might must not no yes in on at by for with from to of about into over under after before between near
far up down out off again very too also just only even still now here there today tomorrow yesterday morning evening night day week month
year time hour minute second first last next one two three four five six seven eight nine ten zero I you he she it we they me him her us
them my your his its our their this that these those some any all each every both few many much more most other another such same different
good bad great nice fine right wrong true false please thanks thank hello hi hey welcome sorry okay sure help tell say said ask asked answer
reply write wrote make made go went come came see saw look looked take took give gave know knew think thought want wanted like liked love
loved need use used work worked keep kept let put run ran walk walked live lived home house people person man woman child friend family way
thing things place world water fire wind sun moon star sky rain snow tree flower sentence word words number numbers name names color colour
color shape image picture photo text line object value key model server request endpoint image large left right top bottom middle center
background small short long""".split()

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

COUNT_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]

# Printed in training images; short and frequent so that a small tower can learn to read them.
PRINTED = """STOP OPEN EXIT SALE HELP PUSH PULL SHOP CAFE HOTEL TAXI BUS PARK ZOO BANK FOOD MENU FREE NEW HOT COLD FAST SLOW LEFT RIGHT UP
DOWN YES NO HELLO WORLD CAT DOG FOX OWL SUN MOON STAR TREE FISH BIRD BOOK LAMP KEY MAP CUP RED BLUE GREEN GOLD ICE TEA MILK""".split()

_CONTENT = [NOUNS, OBJECTS, ANIMALS, FOODS, ADJECTIVES, VERBS, TOPICS, PLACES, JOBS, HOBBIES, CITIES, NAMES]
_WORDS = [*_CONTENT, NOUNS, VERBS, OBJECTS, COMMON, COMMON, SURNAMES]

_ONSETS = "b c d f g h j k l m n p r s t v w z br cl dr fl gr kr pl pr sk sl st tr th sh ch".split()
_VOWELS = "a e i o u a e i o ai ee oo".split()
_CODAS = ["", "", "", "n", "r", "l", "s", "x", "k", "m", "t", "nd", "st"]


def is_held(value: str) -> bool:
    """True for about one string in eight: those only the evaluation may use."""
    return zlib.crc32(value.encode()) % 8 == 0


@cache
def pieces() -> tuple[str, ...]:
    """The letter tokens of the tokenizer, lower case. Words coined from them make every token one that may have to be copied.
    None before the tokenizer is built."""
    path = DEMO / "tokenizer.json"
    if not path.is_file():
        return ()
    vocab = json.loads(path.read_text())["model"]["vocab"]
    return tuple(sorted(t for t in vocab if t.isascii() and t.isalpha() and t.islower() and len(t) > 1))


class Draw:
    """A seeded source of choices that stays on one side of the held-out split."""

    def __init__(self, seed: int | str, held: bool = False) -> None:
        self.rng = random.Random(f"{seed}/{held}")
        self.held = held

    def any(self, pool: Sequence[T]) -> T:
        return self.rng.choice(pool)

    def value(self, pool: Sequence[str]) -> str:
        """A word of this side of the split (of the whole pool when the side is empty)."""
        for _ in range(60):
            word = self.rng.choice(pool)
            if is_held(word) == self.held:
                return word
        return self.rng.choice(pool)

    def values(self, pool: Sequence[str], count: int) -> list[str]:
        found: list[str] = []
        while len(found) < count:
            word = self.value(pool) if self.rng.random() < 0.9 else self.any(pool) if not self.held else self.value(pool)
            if word not in found:
                found.append(word)
            elif self.held and len([w for w in pool if is_held(w)]) <= len(found):
                found.append(self.coined())
        return found

    def frame(self, grammar: "Grammar") -> str:
        """A wording of this side of the split; a grammar too small to have a held-out one gives any."""
        for _ in range(40):
            text = grammar.draw(self.rng)
            if is_held(text) == self.held:
                return text
        return grammar.draw(self.rng)

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def int(self, low: int, high: int) -> int:
        return self.rng.randint(low, high)

    def coined(self, low: int = 2, high: int = 3) -> str:
        """A word nobody knows: of syllables, of the tokenizer's pieces, or of any letters; in training also two words joined."""
        while True:
            if not self.held and self.chance(0.3):
                word = self.joined()
                if not is_held(word) and len(word) < 20:
                    return word
                continue
            roll = self.rng.random()
            if roll < 0.45 or not pieces():
                count = self.int(low, high)
                word = "".join(self.any(_ONSETS) + self.any(_VOWELS) + (self.any(_CODAS) if i == count - 1 else "") for i in range(count))
            elif roll < 0.9:
                word = "".join(self.any(pieces()) for _ in range(self.any([1, 1, 2, 2, 3])))
            else:
                word = "".join(self.any("abcdefghijklmnopqrstuvwxyz") for _ in range(self.int(3, 7)))
            if is_held(word) == self.held and len(word) < 16 and word not in ("true", "false", "null"):
                return word

    def joined(self) -> str:
        """Two words as one, such as `drum-blim`. Either may be one that is held out on its own: a token whose spelling and capitals
        were never seen could not be written down by anybody."""
        syllables = "".join(self.any(_ONSETS) + self.any(_VOWELS) for _ in range(self.int(1, 2)))
        other = syllables if self.chance(0.5) or not pieces() else self.any(pieces()) if self.chance(0.5) else self.any(self.any(_WORDS)).lower()
        both = [self.any(self.any(_WORDS)).lower() if self.chance(0.7) or not pieces() else self.any(pieces()), other]
        self.rng.shuffle(both)
        return self.any("-_").join(both)

    def code(self) -> str:
        letters = "".join(self.any("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(self.int(1, 3)))
        return letters + self.any(["-", ""]) + "".join(self.any("0123456789") for _ in range(self.int(2, 4)))

    def prose(self, count: int) -> str:
        """Words in no order, with some punctuation: text that means nothing."""
        words: list[str] = []
        for i in range(count):
            roll = self.rng.random()
            word = self.any(COMMON) if roll < 0.55 else self.value(self.any(_CONTENT)) if roll < 0.9 else self.coined()
            start = i == 0 or words[-1].endswith(".")
            words.append((word.capitalize() if start else word) + ("," if self.chance(0.06) else "." if self.chance(0.08) and i else ""))
        return " ".join(words)

    def person(self) -> str:
        roll = self.rng.random()
        if roll < 0.5:
            return self.value(NAMES)
        if roll < 0.7:
            return f"{self.value(NAMES)} {self.value(SURNAMES)}"
        return self.coined().capitalize()

    def city(self) -> str:
        return self.value(CITIES) if self.chance(0.6) else self.coined().capitalize()


class Grammar:
    """Wordings written as `(a|b|) c`: each bracket is a free choice, brackets may nest, and `{slots}` are left for the caller."""

    def __init__(self, *forms: str) -> None:
        self.forms = forms

    def draw(self, rng: random.Random) -> str:
        text = rng.choice(self.forms)
        while "(" in text:
            end = text.index(")")
            start = text.rindex("(", 0, end)
            text = text[:start] + rng.choice(text[start + 1 : end].split("|")) + text[end + 1 :]
        return text.replace("[[", "(").replace("]]", ")")
