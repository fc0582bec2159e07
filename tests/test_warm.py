"""`--warm-prompts`: what is in the file is asked once, for one token, in every caller's namespace."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.api.fakes import FakeGeneration, make_context
from vllm_mlx.engine.request import BACKGROUND
from vllm_mlx.errors import SettingsError
from vllm_mlx.warm import read_prompts, warm

CHAT = '{"messages": [{"role": "system", "content": "You are terse."}], "max_tokens": 500, "stream": true}'
COMPLETION = '{"prompt": ["once", "twice"]}'


def written(tmp_path: Path, *lines: str) -> str:
    file = tmp_path / "warm.jsonl"
    file.write_text("\n".join(lines))
    return str(file)


async def test_each_prompt_is_computed_for_one_token_in_the_background(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = FakeGeneration()
    with caplog.at_level(logging.INFO):
        await warm(make_context(service), read_prompts(written(tmp_path, CHAT, "", COMPLETION)))
    assert [r.max_tokens for r in service.requests] == [1, 1, 1]
    assert {r.priority for r in service.requests} == {BACKGROUND} and {r.namespace for r in service.requests} == {""}
    assert [r.prompt for r in service.requests[1:]] == ["once", "twice"]
    assert "3 warm prompts" in caplog.text


async def test_every_key_has_its_own(tmp_path: Path) -> None:
    service = FakeGeneration()
    context = make_context(service)
    context.api_keys = {"alice": "a", "bob": "b"}
    await warm(context, read_prompts(written(tmp_path, CHAT)))
    assert [r.namespace for r in service.requests] == ["key:alice/", "key:bob/"]


@pytest.mark.parametrize(
    ("line", "says"),
    [("{", "line 2"), ('{"messages": 3}', "line 2"), ('{"prompt": []}', "line 2"), ("[1]", "JSON object")],
)
def test_a_wrong_line_ends_the_start_and_is_named(line: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=says):
        read_prompts(written(tmp_path, CHAT, line))


def test_a_missing_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        read_prompts(str(tmp_path / "nowhere"))
