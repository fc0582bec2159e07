"""Reading a streamed answer from its pieces, wherever the socket cut it; and over a real socket."""

from __future__ import annotations

import asyncio
import json

import pytest

from vllm_mlx.bench.client import Endpoint, read_answer, stream_chat

USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}


def event(**message) -> bytes:
    return b"data: " + json.dumps(message).encode() + b"\n\n"


def delta(text: str) -> bytes:
    return event(choices=[{"delta": {"content": text}}])


EVENTS = [
    event(choices=[{"delta": {"role": "assistant", "content": ""}}]),
    delta("Hél"),
    b": keep-alive\n\n",
    delta("lo"),
    delta("\n!"),
    event(choices=[], usage=USAGE),
    b"data: [DONE]\n\n",
]
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"


def chunked(events: list[bytes]) -> bytes:
    body = b"".join(b"%x\r\n%s\r\n" % (len(e), e) for e in events)
    return HEAD + b"transfer-encoding: chunked\r\n\r\n" + body + b"0\r\n\r\n"


def cut(data: bytes, size: int) -> list[tuple[float, bytes]]:
    """Pieces of `size` bytes, each a second later."""
    return [(float(i), data[start : start + size]) for i, start in enumerate(range(0, len(data), size))]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 100_000])
@pytest.mark.parametrize("is_chunked", [True, False])
def test_an_answer_reads_the_same_wherever_it_is_cut(size: int, is_chunked: bool) -> None:
    data = chunked(EVENTS) if is_chunked else HEAD + b"\r\n" + b"".join(EVENTS)
    trace = read_answer(0.0, cut(data, size))
    assert trace.error is None and trace.text == "Héllo\n!" and len(trace.stamps) == 3
    assert (trace.num_prompt_tokens, trace.num_completion_tokens, trace.num_cached_tokens) == (9, 3, 4)


def test_an_event_has_the_time_of_the_piece_that_completed_it() -> None:
    head = HEAD + b"\r\n"
    first, second = delta("a"), delta("b")
    pieces = [(1.0, head + first[:9]), (2.0, first[9:] + second[:4]), (5.0, second[4:] + b"data: [DONE]\n\n")]
    assert read_answer(0.0, pieces).stamps == [2.0, 5.0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"HTTP/1.1 503 Busy\r\n\r\n{}", "HTTP 503"),
        (b"", "no answer"),
        (chunked(EVENTS[:3]), "cut off"),
        (chunked([event(error={"message": "out of luck"}), EVENTS[-1]]), "out of luck"),
        (chunked([EVENTS[0], EVENTS[-1]]), "no content"),
    ],
)
def test_what_went_wrong_is_in_the_trace(data: bytes, message: str) -> None:
    assert message in (read_answer(0.0, cut(data, 10)).error or "")


def test_a_server_without_usage_is_counted_by_events() -> None:
    trace = read_answer(0.0, cut(chunked([delta("a"), delta("b"), EVENTS[-1]]), 50))
    assert trace.num_completion_tokens == 2 and trace.is_counted_by_events


async def test_a_request_over_a_socket_carries_body_and_key() -> None:
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        seen.append(head + await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r")[0])))
        writer.write(chunked(EVENTS))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        endpoint = Endpoint(f"http://127.0.0.1:{port}/v1", "m", api_key="secret")
        trace = await stream_chat(endpoint, {"model": "m", "stream": True})
    assert trace.error is None and trace.text == "Héllo\n!"
    assert seen[0].startswith(b"POST /v1/chat/completions HTTP/1.1\r\n") and b"Bearer secret" in seen[0]
    assert seen[0].endswith(b'{"model": "m", "stream": true}')


async def test_nobody_listening_is_a_failed_trace() -> None:
    trace = await stream_chat(Endpoint("http://127.0.0.1:9/v1"), {})
    assert "Connect" in (trace.error or "")
