"""The evidence rule: what a record says, what counts as a leak or a fault, and when a run is provisional only."""

from __future__ import annotations

import json

import pytest

from vllm_mlx.commands.evidence import Answer, format_fault, leaked_reasoning, markdown, provisional_because, record
from vllm_mlx.provenance import settings_environment, without_secrets

SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
STRICT = {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}}
OBJECT = {"response_format": {"type": "json_object"}}
FORCED = {"tools": [{"type": "function"}], "tool_choice": "required"}
FACTS = {
    "model": "some/model", "revision": "abc", "command": "python -m vllm_mlx.cli serve some/model",
    "environment": {"VLLM_MLX_PORT": "9000"}, "interpreter": "/venv/bin/python",
    "install": "editable checkout /src, branch main at 0123456789ab, no local changes", "client": "SemaChat",
    "url": "http://127.0.0.1:8000", "version": "1", "when": "now",
}  # fmt: skip


def call(arguments: str) -> Answer:
    return Answer(tool_calls=({"function": {"name": "f", "arguments": arguments}},))


@pytest.mark.parametrize(("payload", "answer", "leaks"), [
    ({}, Answer("plain"), False), ({}, Answer("<think>hm</think>4"), True), ({}, Answer("4</think>"), True),
    ({}, Answer("<|channel|>analysis"), True), ({}, Answer("4", reasoning="hm"), False),
    ({"enable_thinking": False}, Answer("4", reasoning="hm"), True), ({}, Answer("I think so"), False)])  # fmt: skip
def test_reasoning_that_the_reader_sees_is_a_leak(payload, answer, leaks):
    assert bool(leaked_reasoning(payload, answer)) == leaks


@pytest.mark.parametrize(("payload", "answer", "fault"), [
    ({}, Answer("anything"), None), (OBJECT, Answer('{"a": 1}'), ""), (OBJECT, Answer("[1]"), "not an object"),
    (OBJECT, Answer('```json\n{"a": 1}\n```'), "not JSON"), (STRICT, Answer('{"age": 3}'), ""),
    (STRICT, Answer('{"age": "3"}'), "does not fit"), (STRICT, Answer('{"ag', finish_reason="length"), "token limit"),
    (FORCED, Answer("no"), "no tool"), (FORCED, call('{"a": 1}'), ""), (FORCED, call("{"), "not JSON")])  # fmt: skip
def test_an_answer_is_held_to_the_form_that_was_asked_for(payload, answer, fault):
    found = format_fault(payload, answer)
    assert found == fault if not fault else fault in found


def test_a_run_that_no_commit_stands_for_is_provisional():
    assert provisional_because(FACTS) is None
    assert "local changes" in provisional_because({**FACTS, "install": "editable checkout /src, at 01, 2 files differ"})
    assert "no commit" in provisional_because({**FACTS, "install": "installed package"})
    assert "does not say" in provisional_because({})


def test_the_record_holds_every_item_of_the_rule():
    usage = {"prompt_tokens": 7, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}}
    answer = Answer("<think>x", finish_reason="stop", first_s=0.1, total_s=0.3, usage=usage)
    picture = "data:" + "x" * 1000
    made = record(FACTS, [({**OBJECT, "messages": [{"role": "user", "content": picture}]}, answer)])
    [run] = json.loads(json.dumps(made))["runs"]
    assert run["tokens_per_s"] == pytest.approx(20) and run["payload"]["messages"][0]["content"] == picture
    text = markdown(made)
    for fact in ("some/model", "abc", FACTS["command"], "VLLM_MLX_PORT=9000", "/venv/bin/python", FACTS["install"],
                 "SemaChat", "100 ms", "300 ms", "7 + 5 (4, unknown)", "'<think>'", "not JSON"):  # fmt: skip
        assert fact in text, fact
    assert "x" * 200 not in text
    assert "error: gone" in markdown(record(FACTS, [({}, Answer(error="gone"))]))


def test_secrets_are_no_evidence():
    words = ["python", "serve", "m", "--api-key", "sk-1", "--port", "1", "--api-key=sk-2",
             "--ssl-keyfile-password", "pw"]  # fmt: skip
    shown = " ".join(without_secrets(words))
    assert "sk-" not in shown and "pw" not in shown.split() and "--port 1" in shown
    assert settings_environment({"VLLM_MLX_API_KEY": "k", "VLLM_MLX_PORT": "1", "HOME": "/h"}) == {
        "VLLM_MLX_API_KEY": "***", "VLLM_MLX_PORT": "1"}  # fmt: skip
