"""Priority by header or field, in every protocol; a wrong one is a 400 that names it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.fakes import FakeGeneration, client_for, make_context

BODY: dict[str, Any] = {"model": "default", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}


async def priority_of(path: str, headers: dict[str, str] | None = None, **fields: Any) -> int:
    service = FakeGeneration()
    async with client_for(make_context(service)) as client:
        response = await client.post(path, json={**BODY, **fields}, headers=headers)
    assert response.status_code == 200, response.text
    return service.requests[0].priority


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
async def test_a_name_or_a_number_in_header_or_field(path: str) -> None:
    assert await priority_of(path) == 0
    assert await priority_of(path, {"x-priority": "background"}) == 100
    assert await priority_of(path, {"x-priority": "3"}) == 3
    assert await priority_of(path, priority="background") == 100
    assert await priority_of(path, {"x-priority": "background"}, priority=7) == 7


async def test_a_wrong_one_is_refused_by_name() -> None:
    async with client_for(make_context(FakeGeneration())) as client:
        by_header = await client.post("/v1/chat/completions", json=BODY, headers={"x-priority": "urgent"})
        by_field = await client.post("/v1/chat/completions", json={**BODY, "priority": "urgent"})
    assert by_header.status_code == 400 and by_header.json()["error"]["param"] == "x-priority"
    assert by_field.status_code == 400 and by_field.json()["error"]["param"] == "priority"
