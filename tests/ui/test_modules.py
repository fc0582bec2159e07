"""Claims about the page's pure modules, run by node where there is one, and about the shipped files everywhere."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import vllm_mlx.ui

UI = Path(vllm_mlx.ui.__file__).parent
FILES = [path for path in UI.rglob("*") if path.suffix in {".js", ".css", ".html", ".svg"}]
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


def js(tmp_path: Path, module: str, expression: str) -> Any:
    """The value of an expression over one module's exports, named `m`."""
    (tmp_path / "m.mjs").write_text((UI / module).read_text())
    code = f"import * as m from './m.mjs'; console.log(JSON.stringify({expression}))"
    (tmp_path / "run.mjs").write_text(code)
    done = subprocess.run(["node", "run.mjs"], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=True)
    return json.loads(done.stdout)


def test_the_files_are_small_and_name_no_other_site():
    assert sum(path.stat().st_size for path in FILES) < 200_000
    for path in FILES:
        text = path.read_text()
        assert not re.search(r"""(src|href|from|import|url)\s*[=(]?\s*["']?(https?:)?//\w""", text), path.name
        assert not re.search(r"innerHTML|AdjacentHTML|\beval\(|new Function|style=|<style|<script>", text), path.name


@needs_node
@pytest.mark.parametrize("url", ["javascript:alert(1)", "data:text/html,x", "file:///etc/passwd", "/relative"])
def test_links_keep_only_harmless_schemes(tmp_path, url):
    assert js(tmp_path, "markdown.js", f"m.parseInline({json.dumps(f'[x]({url})')})")[0]["type"] == "span"


@needs_node
def test_markdown_blocks_tile_the_text_in_order(tmp_path):
    text = "# T\n\na *b*\n\n- x\n  - y\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```py\nx\n```\n\n$$\nx\n$$\n\n> q\n"
    blocks = js(tmp_path, "markdown.js", f"m.parseBlocks({json.dumps(text)})")
    assert [b["type"] for b in blocks] == ["heading", "paragraph", "list", "table", "code", "math", "quote"]
    assert all(a["end"] <= b["start"] for a, b in zip(blocks, blocks[1:], strict=False))


@needs_node
def test_money_is_not_math(tmp_path):
    kinds = js(tmp_path, "markdown.js", "['$5 and $6', '$x$'].map(t => m.parseInline(t).map(n => n.type))")
    assert kinds == [["text"], ["math"]]


@needs_node
def test_highlighting_loses_no_text(tmp_path):
    code = 'def f(x):  # "no"\n    return "a\\"b" + \'\'\'c\n'
    parts = js(tmp_path, "highlight.js", f"m.highlight({json.dumps(code)}, 'py')")
    assert "".join(text for _, text in parts) == code
    assert ["com", '# "no"'] in parts and ["kw", "return"] in parts


@needs_node
@pytest.mark.parametrize("lang", ["py", "diff", "unknown"])
def test_long_code_is_coloured_in_pieces_of_whole_lines(tmp_path, lang):
    code = "".join(f"x = {i}  # c\n{'y' * (i % 3)}\n" for i in range(60)) + '"""\nopen\n' * 2 + "z"
    walk = f"""(() => {{
      const text = {json.dumps(code)}, ends = [];
      for (let at = 0; at < text.length;) {{ [, at] = m.highlightChunk(text, '{lang}', at); ends.push(at); }}
      return [ends, m.highlight(text, '{lang}').map(([, part]) => part).join("") === text];
    }})()"""
    ends, is_whole = js(tmp_path, "highlight.js", walk)
    assert is_whole and len(ends) > 3 and ends[-1] == len(code)
    assert all(code[end - 1] == "\n" for end in ends[:-1])


@needs_node
def test_the_calculator_computes_and_says_what_it_cannot_read(tmp_path):
    given = ["2+3*4", "-2^2", "(1+2)*sqrt(16)", "1/0", "process.exit()"]
    call = "JSON.parse(m.runTool('calculate', JSON.stringify({expression: e})))"
    results = js(tmp_path, "tools.js", f"{json.dumps(given)}.map(e => {call})")
    assert results[:3] == [14, -4, 12]
    assert all("error" in r for r in results[3:])


@needs_node
def test_formulas_end_whatever_they_hold(tmp_path):
    given = ["\\frac{1}{2}", "x}", "{" * 500, "\\begin{pmatrix}1&2\\\\3&4", "\\sqrt[3", "^", "\\left("]
    trees = js(tmp_path, "math.js", f"{json.dumps(given)}.map(t => m.parseMath(t))")
    assert all(tree["tag"] == "math" for tree in trees)


@needs_node
def test_words_in_a_formula_keep_the_blanks_around_them(tmp_path):
    given = json.dumps("x \\text{ if } y")
    texts = js(tmp_path, "math.js", f"JSON.stringify(m.parseMath({given})).includes('\\u00a0if\\u00a0')")
    assert texts is True


TURNS = """[{role: 'user', text: 'a', images: []},
  {role: 'assistant', steps: [{text: 'b', reasoning: 'r', calls: []}]},
  {role: 'user', text: 'c', images: [{url: 'data:image/png;base64,AA'}]},
  {role: 'assistant', steps: [{text: '', reasoning: '', calls: [{id: '1', name: 'f', arguments: '{}', result: '2'}]}]}
]"""


@needs_node
@pytest.mark.parametrize(("limit", "roles"), [
    ("null", ["user", "assistant", "user", "assistant", "tool"]),
    ("2", ["user", "assistant", "tool"]),
    ("1", ["user", "assistant", "tool"]),
])
def test_history_is_cut_at_a_question_and_a_round_of_tools_is_never_torn(tmp_path, limit, roles):
    settings = f"{{...m.DEFAULTS, max_messages: {limit}}}"
    messages = js(tmp_path, "chat.js", f"m.toMessages({TURNS}, {settings})")
    assert [message["role"] for message in messages] == roles


@needs_node
def test_thousands_are_told_apart(tmp_path):
    assert js(tmp_path, "chat.js", "[7, 999, 1000, 1234567, 0.5, 1000.25, undefined].map(m.count)") == [
        "7", "999", "1\u202f000", "1\u202f234\u202f567", "0.5", "1\u202f000.25", "0"]


@needs_node
def test_a_request_holds_only_what_was_set(tmp_path):
    body = js(tmp_path, "chat.js", "m.requestBody([], m.DEFAULTS, [], {reasoning: false})")
    assert set(body) == {"model", "messages", "stream", "stream_options", "include_diagnostics"}


@needs_node
def test_an_imported_file_is_reduced_to_what_the_page_knows(tmp_path):
    turn = {"id": "x", "role": "user", "parent": None, "next": "nowhere", "text": 5, "onclick": "alert(1)",
            "images": [{"url": "javascript:alert(1)"}, {"url": "data:image/png;base64,AA", "name": "a"}]}
    file = {"format": "vllm-mlx-conversations", "conversations": [{"title": "t", "first": "x", "turns": {"x": turn}}]}
    [conversation] = js(tmp_path, "tree.js", f"m.importText({json.dumps(json.dumps(file))})")
    assert conversation["turns"]["x"] == {
        "id": "x", "role": "user", "parent": None, "next": None, "text": "5",
        "images": [{"url": "data:image/png;base64,AA", "name": "a"}]}


@needs_node
def test_taking_a_turn_away_takes_what_stands_under_it_and_shows_a_sibling(tmp_path):
    code = """(() => {
      const c = m.newConversation();
      const a = m.add(c, m.userTurn("a"), null), b = m.add(c, m.userTurn("b"), null);
      m.add(c, m.answerTurn(), b.id);
      m.remove(c, b.id);
      return [m.path(c).map(t => t.text), Object.keys(c.turns).length, c.title];
    })()"""
    assert js(tmp_path, "tree.js", code) == [["a"], 1, "a"]
