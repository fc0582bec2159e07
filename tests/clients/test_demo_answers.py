"""The built-in model behind a real server, asked through the official packages: calls, shapes, thinking, pictures.

Where it matters what the model says, the answer is forced or the question is one it must know; a better one passes too.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from enum import Enum
from typing import Any

import anthropic
import jsonschema
import openai
import pytest
from PIL import Image, ImageDraw
from pydantic import BaseModel, Field

from tests.serving.process import ServerProcess

WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Weather of a city", "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "enum": ["Paris", "Oslo", "Rome"]}},
        "required": ["city"], "additionalProperties": False}},
}  # fmt: skip
CLOCK = {
    "type": "function",
    "function": {"name": "get_time", "description": "Time of a zone", "parameters": {
        "type": "object", "properties": {"zone": {"type": "string", "enum": ["UTC", "CET"]}}, "required": ["zone"],
        "additionalProperties": False}},
}  # fmt: skip
TOOLS: list[Any] = [WEATHER, CLOCK]
NAMED = {"type": "function", "function": {"name": "get_time"}}
PARIS: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
BOTH: list[Any] = [{"role": "user", "content": "What is the weather in Paris and in Oslo?"}]
SUM: list[Any] = [{"role": "user", "content": "What is 312 + 145?"}]


class Colour(Enum):
    red = "red"
    blue = "blue"


class Thing(BaseModel):
    name: str = Field(max_length=12)
    colour: Colour
    count: int
    is_new: bool
    sizes: list[Colour] = Field(max_length=3)


@pytest.fixture(scope="module")
def server(demo_process: ServerProcess) -> ServerProcess:
    return demo_process


@pytest.fixture(scope="module")
def client(server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, stream: bool, **fields: Any) -> Any:
    """The choice of a chat, whole or folded by the package from the stream."""
    fields = {"model": "default", "messages": PARIS, "max_tokens": 200, "temperature": 0.0, **fields}
    if not stream:
        return client.chat.completions.create(**fields).choices[0]
    with client.chat.completions.stream(**fields) as events:
        return events.get_final_completion().choices[0]


def calls_of(choice: Any) -> list[tuple[str, Any]]:
    return [(c.function.name, json.loads(c.function.arguments)) for c in choice.message.tool_calls or []]


def assert_calls_fit(choice: Any) -> None:
    schemas = {t["function"]["name"]: t["function"]["parameters"] for t in TOOLS}
    for name, arguments in calls_of(choice):
        jsonschema.validate(arguments, schemas[name])
    ids = [c.id for c in choice.message.tool_calls or []]
    assert len(set(ids)) == len(ids) and all(ids)


# ── tools ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("choice", ["none", "auto", "required", NAMED], ids=["none", "auto", "required", "named"])
def test_each_tool_choice_is_kept(client, choice, parallel, stream):
    answer = ask(client, stream, tools=TOOLS, tool_choice=choice, parallel_tool_calls=parallel)
    calls = calls_of(answer)
    assert_calls_fit(answer)
    assert answer.finish_reason == ("tool_calls" if calls else "stop")
    if choice == "none":
        assert not calls and answer.message.content
    elif choice != "auto":
        assert calls and not answer.message.content
        assert choice == "required" or {name for name, _ in calls} == {"get_time"}
    if not parallel:
        assert len(calls) <= 1


def test_the_name_of_a_call_comes_first_and_its_arguments_behind(client):
    stream = client.chat.completions.create(
        model="default", messages=PARIS, max_tokens=200, temperature=0.0, tools=TOOLS, tool_choice=NAMED, stream=True
    )
    deltas = [call for chunk in stream for choice in chunk.choices for call in choice.delta.tool_calls or []]
    first, *rest = deltas
    assert first.id and first.function.name == "get_time" and not first.function.arguments
    assert rest and all(d.id is None and d.function.name is None and d.index == first.index for d in rest)
    assert set(json.loads("".join(d.function.arguments for d in rest))) == {"zone"}


def test_two_calls_of_a_turn_are_answered_by_their_results(client):
    for seed in range(20):  # what the model writes is its own; that it may write two is ours
        answer = ask(client, bool(seed % 2), messages=BOTH, tools=TOOLS[:1], tool_choice="required", seed=seed,
                     temperature=0.7 if seed else 0.0)  # fmt: skip
        assert_calls_fit(answer)
        if len(calls_of(answer)) == 2:
            break
    assert len(calls_of(answer)) == 2 and answer.finish_reason == "tool_calls"
    turn = {"role": "assistant", "content": None, "tool_calls": [
        {"id": c.id, "type": "function", "function": {"name": c.function.name, "arguments": c.function.arguments}}
        for c in answer.message.tool_calls]}  # fmt: skip
    results = [{"role": "tool", "tool_call_id": c["id"], "content": "12 degrees"} for c in turn["tool_calls"]]
    whole, streamed = (ask(client, stream, messages=[*BOTH, turn, *results], tools=TOOLS[:1], tool_choice="none")
                       for stream in (False, True))  # fmt: skip
    assert whole.message.content == streamed.message.content != "" and whole.finish_reason == "stop"


def test_strict_tools_hold_their_shape_also_where_the_model_may_choose(client):
    strict = [{"type": "function", "function": {**t["function"], "strict": True}} for t in TOOLS]
    num_calls = 0
    for seed in range(8):
        answer = ask(client, False, tools=strict, tool_choice="auto", temperature=1.3, seed=seed, logprobs=True)
        if answer.finish_reason != "length":
            assert_calls_fit(answer)
            num_calls += len(calls_of(answer))
        assert answer.logprobs.content
        again = ask(client, False, tools=strict, tool_choice="auto", temperature=1.3, seed=seed)
        assert calls_of(again) == calls_of(answer) and again.message.content == answer.message.content
    assert num_calls


def test_messages_with_tools_round_trip(claude):
    tool: Any = {"name": "get_weather", "input_schema": WEATHER["function"]["parameters"]}  # type: ignore[index]
    for choice in ({"type": "any"}, {"type": "tool", "name": "get_weather"}):
        asked: Any = dict(model="default", max_tokens=200, messages=PARIS, tools=[tool], tool_choice=choice)
        with claude.messages.stream(**asked) as stream:
            streamed = stream.get_final_message()
        for message in (claude.messages.create(**asked), streamed):
            assert message.stop_reason == "tool_use"
            for block in message.content:
                assert block.type == "tool_use" and block.input["city"] in ("Paris", "Oslo", "Rome")
    results = [{"type": "tool_result", "tool_use_id": b.id, "content": "rain"} for b in streamed.content]
    turns: Any = [*PARIS, {"role": "assistant", "content": streamed.content}, {"role": "user", "content": results}]
    answer = claude.messages.create(
        model="default", max_tokens=60, messages=turns, tools=[tool], tool_choice={"type": "none"}
    )
    assert answer.content[0].type == "text" and answer.content[0].text


# ── shapes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_parse_gives_objects_of_the_asked_class(client, temperature):
    fields: Any = dict(model="default", messages=PARIS, temperature=temperature, seed=3, max_tokens=300)
    whole = client.chat.completions.parse(response_format=Thing, **fields).choices[0]
    assert isinstance(whole.message.parsed, Thing) and whole.finish_reason == "stop"
    with client.chat.completions.stream(response_format=Thing, **fields) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.message.parsed == whole.message.parsed
    tool = openai.pydantic_function_tool(Thing)
    called = client.chat.completions.parse(tools=[tool], tool_choice="required", **fields).choices[0]
    assert isinstance(called.message.tool_calls[0].function.parsed_arguments, Thing)


def test_a_document_that_the_limit_cut_is_not_parsed_but_refused_by_the_package(client):
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="default", messages=PARIS, response_format=Thing, max_tokens=4)


# ── thinking ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("cap", [0, 1, 20])
def test_a_cap_on_thinking_holds_and_an_answer_follows(client, cap, stream):
    # Cut off after one token of a sum, the demo works it out in its answer and closes the block again in plain text.
    messages = [{"role": "user", "content": "who are you?"}] if cap == 1 else SUM
    fields: Any = dict(model="default", messages=messages, max_tokens=300, temperature=0.0)
    extra = {"enable_thinking": True, "max_thinking_tokens": cap}
    if stream:
        chunks = list(client.chat.completions.create(
            stream=True, stream_options={"include_usage": True}, extra_body=extra, **fields))  # fmt: skip
        deltas = [c.choices[0].delta for c in chunks if c.choices]
        thought = "".join(getattr(d, "reasoning_content", None) or "" for d in deltas)
        text = "".join(d.content or "" for d in deltas)
        usage, reason = chunks[-1].usage, next(c.choices[0].finish_reason for c in reversed(chunks) if c.choices)
    else:
        completion = client.chat.completions.create(extra_body=extra, **fields)
        choice = completion.choices[0]
        thought, text = getattr(choice.message, "reasoning_content", None) or "", choice.message.content
        usage, reason = completion.usage, choice.finish_reason
    counted = usage.completion_tokens_details.reasoning_tokens
    assert counted <= cap and (cap < 20 or 0 < counted)
    assert text and "think>" not in text and "think>" not in thought and reason == "stop"


def test_a_shape_begins_behind_the_thinking(client):
    answer = ask(client, False, messages=SUM, max_tokens=400, extra_body={
        "enable_thinking": True, "max_thinking_tokens": 20, "guided_choice": ["yes", "no"]})  # fmt: skip
    assert answer.message.reasoning_content and answer.message.content in ("yes", "no")


# ── pictures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def circle(colour: str) -> bytes:
    image = Image.new("RGB", (256, 256), (250, 250, 250))
    ImageDraw.Draw(image).ellipse((60, 60, 200, 200), fill=colour)
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def data_url(colour: str) -> str:
    return "data:image/png;base64," + base64.b64encode(circle(colour)).decode()


QUESTION = {"type": "text", "text": "What color is the circle?"}
OFF = {"enable_thinking": False}


@pytest.mark.parametrize("colour", ["red", "blue"])
def test_a_picture_is_seen_by_path_by_data_and_through_either_package(client, claude, tmp_path, colour):
    path = tmp_path / "circle.png"
    path.write_bytes(circle(colour))
    for url in (str(path), path.as_uri(), data_url(colour)):
        for stream in (False, True):
            messages = [{"role": "user", "content": [QUESTION, image_part(url)]}]
            answer = ask(client, stream, messages=messages, max_tokens=32, extra_body=OFF)
            assert colour in answer.message.content.lower()
    source: Any = {"type": "base64", "media_type": "image/png", "data": data_url(colour).partition(",")[2]}
    content: Any = [{"type": "image", "source": source}, QUESTION]
    message = claude.messages.create(
        model="default", max_tokens=32, messages=[{"role": "user", "content": content}], extra_body={"temperature": 0}
    )
    assert colour in message.content[0].text.lower()


def test_several_pictures_stand_where_they_were_put(client):
    """Two pictures in either order are two prompts, and each keeps its own place in the cache."""
    red, blue = image_part(data_url("red")), image_part(data_url("blue"))
    counts = set()
    for pair in ((red, blue), (blue, red), (red, blue)):
        messages: Any = [{"role": "user", "content": [pair[0], QUESTION, pair[1]]}]
        completion = client.chat.completions.create(
            model="default", messages=messages, max_tokens=8, temperature=0.0, extra_body=OFF
        )
        counts.add(completion.usage.prompt_tokens)
        cached = completion.usage.prompt_tokens_details.cached_tokens
    assert len(counts) == 1 and cached > counts.pop() - 32


@pytest.mark.parametrize("role", ["system", "tool"])
def test_a_picture_of_a_system_turn_or_a_tool_result_is_seen(client, role):
    picture = image_part(data_url("red"))
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    before: list[Any] = {
        "system": [{"role": "system", "content": [picture]}],
        "tool": [{"role": "user", "content": "Look."}, {"role": "assistant", "content": None, "tool_calls": [call]},
                 {"role": "tool", "tool_call_id": "c1", "content": [picture]}],
    }[role]  # fmt: skip
    messages = [*before, {"role": "user", "content": [QUESTION]}]
    assert "red" in ask(client, False, messages=messages, max_tokens=32, extra_body=OFF).message.content.lower()
