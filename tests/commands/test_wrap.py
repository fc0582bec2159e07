"""Claims about lines that are broken while their words arrive."""

from __future__ import annotations

import pytest

from vllm_mlx.commands.wrap import Wrapper


def wrapped(text: str, width: int, size: int) -> str:
    wrapper = Wrapper(width)
    return "".join(wrapper.feed(text[i : i + size]) for i in range(0, len(text), size)) + wrapper.end()


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize(("text", "lines"), [
    ("one two three four five", ["one two", "three four", "five"]),
    ("  - indented\n\nnew words", ["  -", "indented", "", "new words"]),
    ("a incomprehensibilities b", ["a", "incomprehensibilities", "b"]),
    ("私は学生です。そうです。", ["私は学生で", "す。そうで", "す。"]),
    ("", [""]),
])
def test_lines_end_between_words_however_the_text_is_cut(text, lines, size):
    assert wrapped(text, 10, size).split("\n") == lines


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_code_is_left_as_it_is(size):
    text = "```py\nx = 'longer than the terminal'\n```\nand after it words"
    assert wrapped(text, 12, size) == "```py\nx = 'longer than the terminal'\n```\nand after it\nwords"
