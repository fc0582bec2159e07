"""Agent frameworks as their users write them, against the built-in model behind a real server.

What the model says is its own affair; that a tool is called with arguments that fit, that a result goes back and that
an output has its type is forced by the request, so a small model must do it too.
"""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from tests.serving.process import ServerProcess

QUESTION = "What is the weather in Paris?"
City = Literal["Paris", "Oslo", "Rome"]


class Report(BaseModel):
    city: City
    is_warm: bool


@pytest.fixture(scope="module")
def server(demo_process: ServerProcess) -> ServerProcess:
    return demo_process


# --- the official package, Responses -------------------------------------------------------------------------------


def test_responses_of_the_official_package_whole_and_streamed(server):
    tool: Any = {"type": "function", "name": "get_weather", "strict": True, "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "enum": ["Paris", "Oslo"]}},
        "required": ["city"], "additionalProperties": False}}  # fmt: skip
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        fields: dict[str, Any] = {"model": "default", "temperature": 0, "max_output_tokens": 100}
        first = client.responses.create(input=QUESTION, tools=[tool], tool_choice="required", **fields)
        (call,) = (item for item in first.output if item.type == "function_call")
        result: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "rain"}]
        second = client.responses.create(input=result, previous_response_id=first.id, tools=[tool], **fields)
        with client.responses.stream(
            input=result, previous_response_id=first.id, tools=[tool], **fields
        ) as stream:
            streamed = stream.get_final_response()
        parsed = client.responses.parse(input="Paris is warm", text_format=Report, **fields)
    assert '"city"' in call.arguments and second.usage.input_tokens > first.usage.input_tokens
    assert streamed.output_text == second.output_text and streamed.usage.input_tokens == second.usage.input_tokens
    assert isinstance(parsed.output_parsed, Report)


# --- openai-agents -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["responses", "chat"])
def test_openai_agents_call_a_tool_and_go_on_with_its_result(server, protocol):
    import agents

    called: list[str] = []

    @agents.function_tool
    def get_weather(city: City) -> str:
        """Weather of a city."""
        called.append(city)
        return "rain"

    async def go() -> tuple[Any, Any]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            kind = agents.OpenAIResponsesModel if protocol == "responses" else agents.OpenAIChatCompletionsModel
            settings = agents.ModelSettings(tool_choice="required", temperature=0, max_tokens=100)
            agent = agents.Agent(
                name="Weather", instructions="You tell the weather.", model=kind("default", client),
                tools=[get_weather], model_settings=settings,
            )  # fmt: skip
            config = agents.RunConfig(tracing_disabled=True)
            whole = await agents.Runner.run(agent, QUESTION, run_config=config, max_turns=4)
            streamed = agents.Runner.run_streamed(agent, QUESTION, run_config=config, max_turns=4)
            async for _ in streamed.stream_events():
                pass
            return whole, streamed

    whole, streamed = asyncio.run(go())
    assert len(called) >= 2 and set(called) <= {"Paris", "Oslo", "Rome"}
    assert isinstance(whole.final_output, str) and streamed.final_output == whole.final_output
    assert {item.type for item in whole.new_items} >= {"tool_call_item", "tool_call_output_item"}


# --- pydantic-ai ---------------------------------------------------------------------------------------------------


def pydantic_model(server: ServerProcess, protocol: str) -> Any:
    from pydantic_ai.models.anthropic import AnthropicModel
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.anthropic import AnthropicProvider
    from pydantic_ai.providers.openai import OpenAIProvider

    if protocol == "anthropic":
        return AnthropicModel("default", provider=AnthropicProvider(base_url=server.url, api_key="none"))
    provider = OpenAIProvider(base_url=f"{server.url}/v1", api_key="none")
    kind = OpenAIResponsesModel if protocol == "responses" else OpenAIChatModel
    return kind("default", provider=provider)


@pytest.mark.parametrize("protocol", ["chat", "responses", "anthropic"])
def test_pydantic_ai_gets_its_type_and_streams_text(server, protocol):
    from pydantic_ai import Agent

    async def go() -> tuple[Any, str]:
        model = pydantic_model(server, protocol)
        typed = Agent(model, output_type=Report, instructions="You tell the weather.", retries=0)
        report = await typed.run("Paris is warm", model_settings={"temperature": 0, "max_tokens": 100})
        plain = Agent(model)
        async with plain.run_stream("Reply with pong", model_settings={"temperature": 0, "max_tokens": 40}) as run:
            text = [piece async for piece in run.stream_text(delta=True)]
        return report, "".join(text)

    report, text = asyncio.run(go())
    assert isinstance(report.output, Report)
    assert report.usage.input_tokens > 0 and text.strip()
