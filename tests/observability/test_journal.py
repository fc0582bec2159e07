"""Claims about the journal: one line for each generation, no text of prompts, numbers that are the request's own."""

from __future__ import annotations

import json
import logging

import pytest

from tests.api.fakes import chat_body, client_for, finished, make_context, says
from vllm_mlx.generation.events import GenerationUsage
from vllm_mlx.observability.journal import Journal, ProblemHandler, RequestFacts
from vllm_mlx.observability.logs import JsonFormatter
from vllm_mlx.settings import Settings

SECRET = "the secret of the prompt"


@pytest.fixture
def lines():
    """What the program logs at info, as JSON."""
    kept: list[dict] = []

    class Keep(logging.Handler):
        def emit(self, record):
            kept.append(json.loads(JsonFormatter().format(record)))

    logger = logging.getLogger("vllm_mlx")
    handler, level = Keep(), logger.level
    logger.addHandler(handler)
    logger.setLevel("INFO")
    yield kept
    logger.removeHandler(handler)
    logger.setLevel(level)


async def ask(context, **fields):
    async with client_for(context) as client:
        body = chat_body(messages=[{"role": "user", "content": SECRET}], **fields)
        return await client.post("/v1/chat/completions", json=body, headers={"x-request-id": "mine"})


@pytest.mark.parametrize("stream", [False, True])
async def test_a_finished_generation_is_one_structured_line_without_its_text(lines, stream):
    context = make_context()
    context.service.script = lambda request: says("Hello", end=finished(usage=GenerationUsage(100, 7, 64, 2)))
    await ask(context, stream=stream)
    [line] = lines
    assert line["logger"] == "vllm_mlx.requests" and line["reason"] == "stop" and line["request_id"] == "mine"
    assert (line["prompt_tokens"], line["cached_tokens"], line["completion_tokens"]) == (100, 64, 7)
    assert line["route"] == "chat" and line["model"] == "test/model" and line["stream"] is stream
    assert line["total_s"] >= line["ttft_s"] >= 0
    assert SECRET not in json.dumps(lines) and "Hello" not in json.dumps(lines)


async def test_prompts_are_logged_when_asked_for(lines):
    await ask(make_context(settings=Settings().with_values(server__log_prompts=True)))
    assert [line["prompt"] for line in lines if "prompt" in line] == [SECRET]


async def test_a_refused_request_has_its_access_line_with_the_reason(lines):
    await ask(make_context(), temperature=-1)
    [line] = lines
    assert line["status"] == 400 and "temperature" in line["error"]


async def test_errors_of_every_kind_are_kept_for_the_dashboard():
    context = make_context()
    context.service.script = lambda request: says("a", end=finished("error", error="The engine tripped."))
    await ask(context)
    await ask(context, temperature=-1)
    logger = logging.getLogger("vllm_mlx.somewhere")
    handler = ProblemHandler(context.journal)
    logger.addHandler(handler)
    logger.warning("the disk is %s", "full")
    logger.removeHandler(handler)
    sources = [problem.source for problem in context.journal.problems]
    assert sources == ["generation: error", "HTTP 500: POST /v1/chat/completions",
                       "HTTP 400: POST /v1/chat/completions", "log: somewhere"]
    assert context.journal.problems[0].message == "The engine tripped."
    assert context.journal.problems[-1].message == "the disk is full"


def test_reasons_of_misses_are_counted_without_their_numbers():
    journal = Journal()
    for number in (3, 90):
        diagnostics = {"cache": {"miss_reason": f"token {number} is the first that differs"}}
        journal.start(RequestFacts("id")).finished("stop", GenerationUsage(1, 1), diagnostics)
    assert journal.miss_reasons == {"token N is the first that differs": 2}


def test_what_is_kept_is_bounded():
    journal = Journal()
    for number in range(1000):
        journal.start(RequestFacts(str(number))).close()
        journal.add_problem("test", str(number))
    assert len(journal.finished) <= 200 and len(journal.problems) <= 100
    assert journal.num_finished == journal.num_problems == 1000
