"""What of a stream is shown before there is an answer, cut at every position."""

from __future__ import annotations

import json

import pytest

from vllm_mlx.supervisor.opening import Opening, error_body, error_event

STREAMS = {
    "openai": (b": keep-alive\n\n: keep-alive\n\n", b"", b'data: {"a":1}\n\ndata: {"b":2}\n\ndata: [DONE]\n\n'),
    "anthropic": (
        b": waiting\n\n",
        b"event: message_start\ndata: {}\n\nevent: ping\ndata: {}\n\n",
        b"event: content_block_start\ndata: {}\n\nevent: ping\ndata: {}\n\n",
    ),
    "responses": (
        b"",
        b"event: response.created\ndata: {}\n\nevent: response.in_progress\ndata: {}\n\n",
        b"event: response.output_item.added\ndata: {}\n\n",
    ),
}


@pytest.mark.parametrize("name", STREAMS)
def test_comments_pass_the_opening_waits_for_the_first_content_and_nothing_is_lost(name: str) -> None:
    comments, opening, content = STREAMS[name]
    whole = comments + opening + content
    for cut in range(len(whole) + 1):
        stream = Opening()
        first = stream.feed(whole[:cut])
        if cut < len(comments + opening) + content.index(b"\n\n"):
            assert not stream.is_over and comments.startswith(first)
        assert first + stream.feed(whole[cut:]) == whole and stream.is_over


def test_byte_by_byte() -> None:
    whole = b"".join(STREAMS["anthropic"])
    stream = Opening()
    assert b"".join(stream.feed(whole[i : i + 1]) for i in range(len(whole))) == whole


def test_a_stream_that_ends_within_its_opening_shows_it_at_the_end() -> None:
    stream = Opening()
    assert stream.feed(b"event: message_start\ndata: {}\n\nevent: pi") == b""
    assert stream.finish() == b"event: message_start\ndata: {}\n\nevent: pi" and stream.is_over


def test_errors_are_each_protocols_own() -> None:
    data = error_event("/v1/chat/completions", "gone").split(b"\n\n")
    assert json.loads(data[0].removeprefix(b"data: "))["error"]["message"] == "gone" and data[1] == b"data: [DONE]"
    for path in ("/v1/messages", "/v1/responses"):
        event = error_event(path, "gone")
        assert event.startswith(b"event: error\ndata: ") and json.loads(event.split(b"data: ")[1])["type"] == "error"
    assert error_body("/v1/messages", "gone", "x")["type"] == "error"
    assert error_body("/v1/models", "gone", "x")["error"]["code"] == "x"  # type: ignore[index]
