"""The synthetic data: the same seed gives the same case, and the held-out side stays apart."""

import json

import pytest

from tools.demo_model import checks, mixture, skills, skills_arithmetic, skills_images, skills_tools
from tools.demo_model.chat import Check, Sample, prompt, user
from tools.demo_model.evaluate import SKILLS
from tools.demo_model.words import NAMES, Draw, Grammar, is_held

ALL = [skill for _, skill in mixture.POOL]


def same(a: Sample, b: Sample) -> bool:
    pictures = all(x.tobytes() == y.tobytes() for x, y in zip(a.images, b.images, strict=True))
    return pictures and (prompt(a), a.reply, a.check) == (prompt(b), b.reply, b.check)


@pytest.mark.parametrize("skill", ALL, ids=lambda f: f.__name__)
def test_same_seed_gives_the_same_case(skill: skills.Skill) -> None:
    for n in range(5):
        assert same(skill(Draw(n)), skill(Draw(n)))


@pytest.mark.parametrize("name", SKILLS)
def test_the_wanted_reply_passes_its_own_check(name: str) -> None:
    skill, _ = SKILLS[name]
    for n in range(25):
        sample = skill(Draw(n, held=True))
        assert checks.right(sample, sample.reply), (sample.reply, sample.check)


@pytest.mark.parametrize("name", [n for n in SKILLS if n not in ("greeting", "story")])
def test_an_unrelated_reply_fails_the_check(name: str) -> None:
    skill, _ = SKILLS[name]
    sample = skill(Draw(1, held=True))
    wrong = '<tool_call>\n{"name": "x", "arguments": {}}\n</tool_call>'
    assert not checks.right(sample, wrong)


def test_values_of_training_and_evaluation_do_not_meet() -> None:
    train = {Draw(n).value(NAMES) for n in range(300)}
    held = {Draw(n, held=True).value(NAMES) for n in range(300)}
    assert train and held and not train & held
    assert all(is_held(word) for word in held)


def test_coined_words_keep_to_their_side() -> None:
    assert all(is_held(Draw(n, held=True).coined()) for n in range(50))
    assert not any(is_held(Draw(n).coined()) for n in range(50))


def test_grammar_takes_nested_choices_and_keeps_slots() -> None:
    drawn = {Grammar("(a|b (c|d)) {x} [[e]]").draw(Draw(n).rng) for n in range(60)}
    assert drawn == {"a {x} (e)", "b c {x} (e)", "b d {x} (e)"}


@pytest.mark.parametrize(
    ("a", "op", "b", "value"),
    [(347, "+", 285, 632), (632, "-", 285, 347), (99, "+", 1, 100), (100, "-", 1, 99), (500, "-", 500, 0)],
)
def test_the_working_spells_the_result(a: int, op: str, b: int, value: int) -> None:
    digits = [line.split("write ")[1][0] for line in skills_arithmetic.working(a, op, b).splitlines()]
    assert int("".join(reversed(digits))) == value


def test_tool_calls_use_a_declared_tool_and_its_parameters() -> None:
    for n in range(40):
        sample = skills_tools.two_calls(Draw(n))
        declared = {t["function"]["name"]: t["function"]["parameters"] for t in sample.tools or []}
        for name, arguments in sample.check.want:
            assert set(declared[name]["required"]) == set(arguments) <= set(declared[name]["properties"])


def test_pictures_have_the_sizes_promised() -> None:
    sizes = [skills_images.describe(Draw(n)).images[0].size for n in range(60)]
    assert all(64 <= side <= 512 for size in sizes for side in size)
    assert any(w != h for w, h in sizes)


def test_thinking_must_show_its_reasoning() -> None:
    sample = Sample("x", [user("1 + 1")], "", Check("sum", 2), thinking=True)
    assert not checks.right(sample, "2")
    assert checks.right(sample, "<think>\n1 + 1\n</think>\n\n1 + 1 = 2")
    assert json.loads('{"kinds": true}') and set(checks.KINDS) >= {"equals", "calls"}


def test_a_capped_thought_is_given_and_the_answer_stands_without_it() -> None:
    whole = skills_arithmetic.arithmetic_thinking(Draw(3))
    for n in range(20):
        cut = mixture.capped(Draw(n), whole)
        assert cut.begun.startswith("<think>\n") and cut.begun.endswith("\n</think>\n\n")
        assert "</think>" not in cut.reply
        assert checks.right(cut, cut.begun + cut.reply) or cut.begun == "<think>\n\n</think>\n\n"


def test_joined_words_hold_no_value_of_the_evaluation() -> None:
    joined = [word for n in range(200) if any(mark in (word := Draw(n).coined()) for mark in "-_")]
    assert len(joined) > 20 and not any(is_held(word) for word in joined)
