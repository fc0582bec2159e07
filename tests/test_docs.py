"""The pages: every link leads somewhere, and every flag that the operator's pages name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vllm_mlx.cli import build_parser
from vllm_mlx.commands.completion import words_of

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("tools/**/*.md")])
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")
# Of git, uv, curl and the like, and one that the guide says does not exist.
OTHERS = {"--all", "--prune", "--ff-only", "--upgrade", "--enable-thinking", "--memory"}


def text_of(page: Path) -> str:
    """The page without its code blocks, where brackets are no links."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Headings, as GitHub names them."""
    titles = re.findall(r"^#+ (.+)$", text_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_a_page_and_a_heading_that_exist(page):
    for link in LINK.findall(text_of(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} leads nowhere"
        assert not anchor or target.suffix != ".md" or anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("name", ["operator-guide", "clients", "server", "continuous-batching", "multimodal"])
def test_flags_of_the_operators_pages_exist(name):
    known = {word for words in words_of(build_parser()).values() for word in words} | OTHERS
    named = set(FLAG.findall((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")))
    assert named and not named - known
