"""Sessions in the shapes of three coding agents, over HTTP, on each kind of cache: events in order, prompts from the
cache, also while lines move, system turns come in and a tool joins. Small here; the whole is `tools.agent_sessions`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest

from tests import tiny_models
from tests.serving.process import ServerProcess, serving
from tools.agent_sessions import SHAPES, TEMPLATE, Scale, play

SCALE = Scale(num_turns=4, base_chars=900, result_chars=40, answer_tokens=8, user_every=3, max_tools=2)
BLOCK = 16
CASES = [
    ("qwen3", "claude-code"), ("qwen3", "codex"), ("qwen3", "opencode"),
    ("gemma3_text", "claude-code"), ("qwen3_next", "codex"),
]  # fmt: skip
KEPT_APART = {"qwen3": 0, "gemma3_text": 512, "qwen3_next": 512}
"""Tokens between states that are kept of a cache that cannot be cut anywhere: the last one may stand so far back."""


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], ServerProcess]]:
    """`serve("qwen3")` is a server on a tiny model of that kind, started once."""
    started: dict[str, ServerProcess] = {}
    with ExitStack() as stack:

        def server(name: str) -> ServerProcess:
            if name not in started:
                folder = tiny_models.build(name, tmp_path_factory.mktemp("agents") / name)
                (folder / "chat_template.jinja").write_text(TEMPLATE)
                config = json.loads((folder / "config.json").read_text())
                (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 32768}))
                log = tmp_path_factory.mktemp("serving") / "log"
                flags = ("--repetition-policy", "off", "--log-level", "warning")
                started[name] = stack.enter_context(serving(folder, *flags, log=log))
            return started[name]

        yield server
        for running in started.values():
            assert "Traceback" not in running.output, running.output


@pytest.mark.parametrize(("model", "shape"), CASES)
def test_each_request_computes_what_is_new_also_when_lines_move_and_a_tool_joins(serve, model, shape):
    scale = replace(SCALE, changes_tools=shape != "opencode")
    turns = asyncio.run(play(serve(model).url, SHAPES[shape](scale)))
    joined = scale.num_turns // 2 if scale.changes_tools else None
    assert turns[0].num_prompt > 800
    for i in range(1, len(turns)):
        computed = turns[i].num_prompt - turns[i].num_cached
        if i == joined:
            # What stands before the new tool is there, where the cache can be cut in the middle of a turn.
            assert KEPT_APART[model] or computed < turns[i].num_prompt - turns[0].num_prompt // 5, turns
            continue
        new = turns[i].num_prompt - turns[i - 1].num_prompt + 2 * BLOCK + KEPT_APART[model]
        assert computed <= new, f"turn {i} computed {computed}: {turns}"
