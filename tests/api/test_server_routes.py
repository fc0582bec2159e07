"""Claims about what the server tells of itself: health, capabilities, models, status, cache, tokens, pages."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import replace

import pytest

from tests.api.fakes import MODEL_ID, FakeGeneration, chat_body, client_for, make_context, says, until
from vllm_mlx.api import gauges
from vllm_mlx.api.context import Phase, ServedModel, ServerContext
from vllm_mlx.app import ROUTERS, announcement, build_app, read_api_keys
from vllm_mlx.engine.step import EngineStatus, Progress
from vllm_mlx.errors import SettingsError
from vllm_mlx.settings import Settings

CHAT = "/v1/chat/completions"


async def get(context: ServerContext, path: str, **options):
    async with client_for(context) as client:
        return await client.get(path, **options)


# --- health --------------------------------------------------------------------------------------------------------


async def test_health_is_200_while_the_engine_is_healthy():
    response = await get(make_context(), "/health")
    body = response.json()
    assert response.status_code == 200 and body["status"] == "healthy"
    assert body["model_loaded"] is True and body["model_name"] == MODEL_ID and body["model_type"] == "llm"


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"phase": Phase.LOADING, "model": None}, "loading"),
        ({"phase": Phase.DRAINING}, "draining"),
        ({"phase": Phase.FAILED, "failure": "lost"}, "unhealthy"),
        ({"read_status": lambda: EngineStatus(is_healthy=False, failure="two steps failed")}, "unhealthy"),
    ],
)
async def test_health_is_503_with_the_reason_when_nothing_can_be_served(fields, word):
    for path in ("/health", "/health/ready"):
        response = await get(make_context(**fields), path)
        assert response.status_code == 503 and response.json()["status"] == word and response.json()["reason"]
    live = await get(make_context(**fields), "/health/live")
    assert live.status_code == (503 if word == "unhealthy" else 200), "only a failed engine is worth a restart"


@pytest.mark.parametrize("phase", [Phase.LOADING, Phase.DRAINING, Phase.FAILED])
async def test_requests_are_503_before_and_after_the_server_can_serve(phase):
    async with client_for(make_context(phase=phase)) as client:
        for path in (CHAT, "/v1/completions"):
            response = await client.post(path, json={**chat_body(), "prompt": "x"})
            assert response.status_code == 503 and response.json()["error"]["type"] == "service_unavailable"
        assert (await client.get("/v1/models")).status_code == 503
        assert (await client.get("/v1/capabilities")).status_code == 200


async def test_diagnostics_take_the_worst_of_their_checks():
    good = {"memory": {"status": "pass", "detail": "fine", "metadata": None}}
    warned = {"memory": {"status": "warning", "detail": "hot", "metadata": {"pct": 80}}}
    for checks, word in ((good, "healthy"), (warned, "degraded")):
        context = make_context(health_checks=lambda c=checks: c, read_memory=lambda: {"active_gb": 1.0})
        body = (await get(context, "/health/diagnostics")).json()
        assert body["status"] == word and body["checks"]["memory"] == checks["memory"]
        assert body["checks"]["version"]["metadata"]["mlx-lm"] and body["memory"] == {"active_gb": 1.0}
    broken = make_context(read_status=lambda: EngineStatus(is_healthy=False, failure="gone"))
    response = await get(broken, "/health/diagnostics")
    assert response.status_code == 200 and response.json()["status"] == "unhealthy"
    assert response.json()["checks"]["engine"]["detail"] == "gone"
    limping = make_context(read_status=lambda: EngineStatus(num_failed_steps=1))
    assert (await get(limping, "/health/diagnostics")).json()["status"] == "degraded"


# --- what is served ------------------------------------------------------------------------------------------------


async def test_models_lists_the_id_and_its_aliases_and_describes_each():
    settings = Settings().with_values(server__model_alias=("haiku=default",))
    async with client_for(make_context(settings=settings)) as client:
        body = (await client.get("/v1/models")).json()
        assert body["object"] == "list"
        assert [m["id"] for m in body["data"]] == [MODEL_ID, "default", "haiku"]
        assert all(m["object"] == "model" and m["owned_by"] == "vllm-mlx" for m in body["data"])
        assert body["data"][0]["max_model_len"] == 4096
        for name in (MODEL_ID, "default", "haiku"):
            assert (await client.get(f"/v1/models/{name}")).json()["id"] == name
        missing = await client.get("/v1/models/other")
        assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"


async def test_a_strict_server_does_not_list_default():
    settings = Settings().with_values(server__strict_model_id=True)
    assert [m["id"] for m in (await get(make_context(settings=settings), "/v1/models")).json()["data"]] == [MODEL_ID]


async def test_models_answer_anthropic_clients_in_their_shape():
    body = (await get(make_context(), "/v1/models", headers={"anthropic-version": "2023-06-01"})).json()
    assert body["data"][0]["type"] == "model" and body["has_more"] is False and body["first_id"] == MODEL_ID
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", body["data"][0]["created_at"])


async def test_capabilities_say_what_a_request_would_meet():
    model = ServedModel(
        id="m", modalities=frozenset({"text", "image"}), context_tokens=100, max_context_tokens=200,
        tool_parser="hermes", reasoning_parser="think_tags", model_type="qwen3", dtype="bfloat16",
    )  # fmt: skip
    settings = Settings().with_values(
        server__strict_model_id=True, server__rate_limit=7, limits__effective_context_tokens=100
    )
    context = make_context(model=model, settings=settings, api_keys={"a": "b"}, notes=("a note",))
    body = (await get(context, "/v1/capabilities", headers={"x-api-key": "b"})).json()
    assert body["object"] == "capabilities" and body["model_type"] == "mllm"
    assert body["modalities"] == {
        "text": True, "image": True, "video": False, "audio_input": False, "audio_output": False
    }  # fmt: skip
    features = body["features"]
    assert features["tool_calling"] and features["auto_tool_choice"] and features["reasoning"]
    assert features["strict_model_id"] and features["streaming"] and features["structured_output"]
    assert body["auth"]["api_key_required"] and body["auth"]["accepted_headers"] == ["authorization", "x-api-key"]
    assert body["rate_limit"] == {"enabled": True, "requests_per_minute": 7}
    assert body["limits"]["effective_context_tokens"] == 100 and body["limits"]["max_context_tokens"] == 200
    assert body["limits"]["effective_context_source"] == "operator_override"
    assert body["model_traits"]["is_vlm"] and body["model_traits"]["reasoning_mechanism"] == "think_tags"
    assert body["policies"]["repetition"]["default_mode"] == "safe" and body["notes"] == ["a note"]


async def test_capabilities_of_a_plain_model_claim_nothing_more():
    body = (await get(make_context(), "/v1/capabilities")).json()
    assert body["model_type"] == "llm" and not body["modalities"]["image"]
    assert not body["features"]["tool_calling"] and not body["features"]["reasoning"]
    assert body["auth"]["api_key_required"] is False and body["rate_limit"]["enabled"] is False
    empty = (await get(make_context(phase=Phase.LOADING, model=None), "/v1/capabilities")).json()
    assert empty["model_loaded"] is False and empty["model_traits"] is None and not empty["modalities"]["text"]


# --- what runs -----------------------------------------------------------------------------------------------------


async def test_status_shows_each_running_request_with_its_progress():
    proceed = asyncio.Event()
    service = FakeGeneration(lambda r: [proceed.wait, *says("x")])
    context = make_context(service)

    def status() -> EngineStatus:
        now = time.monotonic()
        requests = tuple(
            Progress(id, "decode", 100, 100, 11, 50, None, now - 3, now - 1, 64) for id in sorted(service.running)
        )
        return EngineStatus(num_running=len(requests), num_steps=5, requests=requests)

    context.read_status = status
    async with client_for(context) as client:
        answer = asyncio.create_task(client.post(CHAT, json=chat_body(n=2), headers={"x-request-id": "mine"}))
        await until(lambda: len(service.running) == 2)
        body = (await client.get("/v1/status")).json()
        assert body["status"] == "running" and body["num_running"] == 2 and body["steps_executed"] == 5
        first = body["requests"][0]
        assert first["x_request_id"] == "mine" and first["route"] == "chat" and first["phase"] == "decode"
        assert first["prompt_tokens"] == 100 and first["completion_tokens"] == 11 and first["cached_tokens"] == 64
        assert first["progress"] == 0.22 and first["ttft_s"] == 2.0 and 9 < first["tokens_per_second"] <= 10
        assert len((await client.get("/v1/requests")).json()["data"]) == 2
        proceed.set()
        await answer
        body = (await client.get("/v1/status")).json()
        assert body["requests"] == [] and body["total_requests_processed"] == 1
        assert body["runtime"] == {"active_concurrency": 0, "peak_concurrency": 1}


async def test_cache_stats_and_clear():
    cleared = []

    async def clear() -> int:
        cleared.append(1)
        return 77

    status = EngineStatus(num_prefix_hits=3, num_prefix_misses=1, prefix_cache_bytes=9)
    context = make_context(read_status=lambda: status, clear_cache=clear)
    async with client_for(context) as client:
        stats = (await client.get("/v1/cache/stats")).json()
        assert stats["hit_rate"] == 0.75 and stats["prefix_cache_bytes"] == 9
        assert (await client.delete("/v1/cache")).json()["freed_bytes"] == 77 and cleared == [1]
    assert (await get(make_context(), "/v1/cache/stats")).json()["hit_rate"] is None


async def test_metrics_have_vllms_names_and_count_what_happened():
    status = EngineStatus(num_running=3, num_waiting=2, kv_bytes=50, kv_budget_bytes=200, num_completion_tokens=9)
    context = make_context(read_status=lambda: status)
    context.metrics.add_gauges(lambda: gauges.read(context))
    async with client_for(context) as client:
        await client.post(CHAT, json=chat_body())
        await client.post(CHAT, json=chat_body(stream=True))
        await client.post(CHAT, json=chat_body(messages=[]))
        text = (await client.get("/metrics")).text
    for line in (
        'vllm:num_requests_running{model_name="test/model"} 3.0',
        'vllm:num_requests_waiting{model_name="test/model"} 2.0',
        'vllm:kv_cache_usage_perc{model_name="test/model"} 0.25',
        'vllm:generation_tokens_total{model_name="test/model"} 9.0',
        'vllm:time_to_first_token_seconds_count{model_name="test/model"} 2.0',
        'vllm:request_generation_tokens_sum{model_name="test/model"} 14.0',
        'vllm:request_success_total{finished_reason="stop",model_name="test/model"} 2.0',
        'vllm_mlx:http_requests_total{method="POST",route="/v1/chat/completions",status="200"} 2.0',
        'vllm_mlx:http_requests_total{method="POST",route="/v1/chat/completions",status="400"} 1.0',
    ):
        assert line in text, line


# --- tokens --------------------------------------------------------------------------------------------------------


async def test_tokenize_and_detokenize_have_vllms_shapes():
    async with client_for(make_context()) as client:
        body = (await client.post("/tokenize", json={"prompt": "Hi", "return_token_strs": True})).json()
        assert body == {"count": 3, "max_model_len": 4096, "tokens": [1, 72, 105], "token_strs": ["\x01", "H", "i"]}
        plain = (await client.post("/tokenize", json={"prompt": "Hi", "add_special_tokens": False})).json()
        assert plain["tokens"] == [72, 105] and plain["token_strs"] is None
        chat = (await client.post("/tokenize", json={"messages": [{"role": "user", "content": "Hi"}]})).json()
        assert chat["tokens"] == [1, 72, 105]
        assert (await client.post("/detokenize", json={"tokens": [72, 105]})).json() == {"prompt": "Hi"}
        outside = await client.post("/detokenize", json={"tokens": [1, 300]})
        assert outside.status_code == 400 and outside.json()["error"]["param"] == "tokens.1"


# --- pages and documents -------------------------------------------------------------------------------------------


async def test_head_of_the_root_is_200_whether_or_not_there_is_a_page():
    async with client_for(make_context()) as client:
        response = await client.head("/")
    assert response.status_code == 200 and "frame-ancestors 'none'" in response.headers["content-security-policy"]


@pytest.mark.parametrize(
    "path", ["/ui/../app.py", "/ui/%2e%2e/app.py", "/ui/__init__.py", "/ui//etc/passwd", "/ui/none.js", "/ui/a\\b.js"]
)
async def test_nothing_but_the_pages_own_files_can_be_had(path):
    response = await get(make_context(), path)
    assert response.status_code == 404


async def test_openapi_describes_every_route_with_a_summary_its_body_and_its_errors():
    document = (await get(make_context(), "/openapi.json")).json()
    names = set(document["components"]["schemas"])
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert operation.get("summary"), (method, path)
            takes_input = "requestBody" in operation or "{" in path
            assert not takes_input or {"400", "404"} & set(operation["responses"])
            assert "500" in operation["responses"] and "422" not in operation["responses"]
    body = document["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/ChatCompletionRequest"}
    references = set(re.findall(r"#/components/schemas/([\w.-]+)", str(document)))
    assert references <= names, references - names
    assert "messages" in document["components"]["schemas"]["ChatCompletionRequest"]["required"]


def test_no_route_is_defined_twice():
    seen = [
        (method, route.path)
        for router in ROUTERS
        for route in router.routes
        for method in getattr(route, "methods", ())
    ]
    assert len(seen) == len(set(seen))
    build_app(make_context())


# --- start-up ------------------------------------------------------------------------------------------------------


class FakeLoaded:
    def describe(self) -> str:
        return "test/model (llama, float32)"


def test_the_announcement_says_what_where_and_how():
    context = make_context(notes=("nobody checks keys",))
    text = "\n".join(announcement(context, 8123, FakeLoaded()))
    assert "test/model (llama, float32)" in text and "http://127.0.0.1:8123" in text
    assert "curl -sS http://127.0.0.1:8123/v1/chat/completions" in text and "Reply with pong" in text
    assert "nobody checks keys" in text and "YOUR_KEY" not in text
    keyed = make_context(api_keys={"a": "sk-secret"}, settings=Settings().with_values(server__host="0.0.0.0"))
    text = "\n".join(announcement(keyed, 1, FakeLoaded()))
    assert "YOUR_KEY" in text and "sk-secret" not in text and "http://localhost:1" in text


def test_keys_come_from_flag_and_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# people\nalice: sk-1\n\nsk-2\n")
    server = replace(Settings().server, api_key="sk-0", api_key_file=str(file))
    assert read_api_keys(server) == {"default": "sk-0", "alice": "sk-1", "key4": "sk-2"}


@pytest.mark.parametrize("text", ["", "# only\n", "alice: \n", "alice: 1\nalice: 2\n"])
def test_a_key_file_that_protects_nothing_is_an_error(tmp_path, text):
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(SettingsError):
        read_api_keys(replace(Settings().server, api_key_file=str(file)))
    with pytest.raises(SettingsError):
        read_api_keys(replace(Settings().server, api_key_file=str(tmp_path / "none")))
