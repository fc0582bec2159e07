"""The OpenAPI document is true: its examples are sent here, and what it says is always there is there."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from tests.api.fakes import client_for, make_context
from vllm_mlx.api.fields import GenerationFields
from vllm_mlx.api.openapi_examples import SHOWN
from vllm_mlx.app import build_app

DOCUMENT: dict[str, Any] = build_app(make_context()).openapi()
OPERATIONS = {
    f"{method} {path}": operation for path, found in DOCUMENT["paths"].items() for method, operation in found.items()
}
# They need a model of their own, which has tests of its own.
ELSEWHERE = ("mcp", "embeddings", "rerank", "score", "audio", "lora", "load", "dashboard", "{")


def test_every_operation_is_described_and_answers_in_a_known_shape():
    for name, operation in OPERATIONS.items():
        assert operation["summary"] and operation["tags"], name
        assert operation["responses"]["200"]["content"], name
        for status, answer in operation["responses"].items():
            if status != "200":
                (content,) = answer["content"].values()
                assert content["schema"]["$ref"].endswith("Error") and content["example"], (name, status)
        assert "422" not in operation["responses"]


def test_the_table_of_examples_names_operations_that_there_are():
    assert set(SHOWN) <= set(OPERATIONS)


def test_references_lead_somewhere():
    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if isinstance(reference := value.get("$ref"), str):
                assert reference.rsplit("/", 1)[1] in DOCUMENT["components"]["schemas"], reference
            for child in value.values():
                walk(child)
        elif isinstance(value, list):
            for child in value:
                walk(child)

    walk(DOCUMENT)


@pytest.mark.parametrize("name", [name for name in SHOWN if not any(word in name for word in ELSEWHERE)])
async def test_an_example_is_answered_as_it_says(name):
    method, path = name.split()
    shown = SHOWN[name]

    async def clear() -> int:
        return 0

    async with client_for(make_context(clear_cache=clear)) as client:
        answer = await client.request(method, path, json=shown.request)
    assert answer.status_code == 200, answer.text
    content = OPERATIONS[name]["responses"]["200"]["content"]
    kind = answer.headers["content-type"].split(";")[0]
    assert kind in content
    if shown.answer is not None:
        jsonschema.validate(answer.json(), content[kind]["schema"])
        assert set(shown.answer) <= set(answer.json()) | {"max_model_len"}


@pytest.mark.parametrize("name", ["CompletionRequest", "ResponsesRequest", "MessagesRequest"])
def test_what_every_protocol_takes_means_the_same_in_each(name):
    schemas = DOCUMENT["components"]["schemas"]
    for field in GenerationFields.model_fields:
        assert schemas[name]["properties"][field] == schemas["ChatCompletionRequest"]["properties"][field]


async def test_error_examples_have_the_shape_of_errors():
    for operation in OPERATIONS.values():
        for status, answer in operation["responses"].items():
            for content in answer["content"].values():
                if status != "200":
                    shape = content["schema"]["$ref"].rsplit("/", 1)[1]
                    jsonschema.validate(content["example"], DOCUMENT["components"]["schemas"][shape])


async def test_the_page_and_the_document_are_served():
    async with client_for(make_context()) as client:
        assert "openapi.json" in (await client.get("/docs")).text
        assert (await client.get("/openapi.json")).json() == DOCUMENT
