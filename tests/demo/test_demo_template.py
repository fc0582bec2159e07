"""The shipped chat template and tokenizer, as transformers reads them."""

import json
from typing import Any

import pytest
from transformers import AutoTokenizer

from tools.demo_model.chat import TEMPLATE
from tools.demo_model.place import DEMO

QUIET = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get it.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}}},
    },
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


def render(tokenizer: Any, messages: list[dict[str, Any]], **kwargs: Any) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs)


@pytest.mark.parametrize(
    "text",
    [
        "Reply with pong",
        "  two  spaces\n\ttabs\n",
        "Grüße, 你好 😀",
        '{"a": [1, 2.5], "b": null}',
        "zorbex Zorbex ZORBEX",
        "",
    ],
)
def test_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_cases_of_a_word_split_alike(tokenizer: Any) -> None:
    for word in ("weather", "zorbexil", "thermostat"):
        lower, title, upper = ([len(t) for t in tokenizer.tokenize(w)] for w in (word, word.capitalize(), word.upper()))
        assert lower == title == upper


def test_special_tokens_are_single_and_the_table_is_full(tokenizer: Any) -> None:
    for token in ("<|im_start|>", "<|im_end|>", "<|image_pad|>", "<tool_call>", "</think>"):
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1
    assert len(tokenizer) == json.loads((DEMO / "config.json").read_text())["vocab_size"]


def test_plain_chat_does_not_think(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    want = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n" + QUIET
    assert render(tokenizer, messages) == want
    assert render(tokenizer, messages, enable_thinking=False) == want


def test_thinking_leaves_the_block_to_the_model(tokenizer: Any) -> None:
    assert render(tokenizer, [{"role": "user", "content": "hi"}], enable_thinking=True).endswith(
        "<|im_start|>assistant\n"
    )


def test_history_loses_its_reasoning(tokenizer: Any) -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nx\n</think>\n\nb"},
        {"role": "user", "content": "c"},
    ]
    assert "<|im_start|>assistant\nb<|im_end|>" in render(tokenizer, messages)


def test_tools_are_listed_one_a_line(tokenizer: Any) -> None:
    text = render(tokenizer, [{"role": "user", "content": "hi"}], tools=[WEATHER])
    listed = text.split("<tools>\n")[1].split("\n</tools>")[0]
    assert json.loads(listed) == {
        "name": "get_weather",
        "description": "Get it.",
        "parameters": {"city": "string", "unit": {"enum": ["C", "F"]}},
    }


@pytest.mark.parametrize("arguments", [{"city": "Oslo"}, '{"city": "Oslo"}'])
def test_calls_and_results_of_the_history(tokenizer: Any, arguments: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call, call]}]
    messages += [
        {"role": "tool", "content": "A", "tool_call_id": "1"},
        {"role": "tool", "content": "B", "tool_call_id": "1"},
    ]
    text = render(tokenizer, messages, tools=[WEATHER])
    one = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    assert f"<|im_start|>assistant\n{one}\n{one}<|im_end|>\n" in text
    assert (
        "<|im_start|>user\n<tool_response>\nA\n</tool_response>\n<tool_response>\nB\n</tool_response><|im_end|>\n"
        in text
    )


@pytest.mark.parametrize("kind", [{"type": "image"}, {"type": "image_url", "image_url": {"url": "x"}}])
def test_every_image_gets_a_place(tokenizer: Any, kind: dict[str, Any]) -> None:
    text = render(tokenizer, [{"role": "user", "content": [kind, kind, {"type": "text", "text": "Compare."}]}])
    assert "<|im_start|>user\n" + "<|vision_start|><|image_pad|><|vision_end|>" * 2 + "Compare.<|im_end|>" in text


def test_the_shipped_template_is_the_one_trained_with() -> None:
    assert (DEMO / "chat_template.jinja").read_text() == TEMPLATE.read_text()
