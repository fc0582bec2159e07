"""What of a stream may be shown before it is sure that there is an answer. Pure bytes, no I/O.

A stream whose engine dies before the first word is asked again, and the client must not notice. So the events that only
open a stream, which name its id, are held back until the first one with content; comments pass.
"""

from __future__ import annotations

import orjson

_OPENING = (b"event: message_start", b"event: ping", b"event: response.created", b"event: response.in_progress")
_END = b"\n\n"


class Opening:
    """Fed the raw bytes of an event stream; gives back what may be sent. `is_over` once everything may."""

    def __init__(self) -> None:
        self._held: list[bytes] = []
        self._partial = b""
        self.is_over = False

    def feed(self, data: bytes) -> bytes:
        if self.is_over:
            return data
        out = []
        self._partial += data
        while _END in self._partial:
            event, _, self._partial = self._partial.partition(_END)
            event += _END
            if event.startswith(b":"):
                out.append(event)
            elif event.startswith(_OPENING):
                self._held.append(event)
            else:
                self.is_over = True
                out += [*self._held, event, self._partial]
                self._held, self._partial = [], b""
                break
        return b"".join(out)

    def finish(self) -> bytes:
        """The stream has ended: what is still held."""
        rest = b"".join(self._held) + self._partial
        self._held, self._partial, self.is_over = [], b"", True
        return rest


def error_event(path: str, message: str) -> bytes:
    """What ends a stream that cannot go on, in the protocol of `path`."""
    if path.startswith("/v1/messages"):
        error = {"type": "error", "error": {"type": "api_error", "message": message}}
        return b"event: error\ndata: " + orjson.dumps(error) + _END
    if path.startswith("/v1/responses"):
        event = {"type": "error", "code": "server_error", "message": message, "param": None, "sequence_number": 0}
        return b"event: error\ndata: " + orjson.dumps(event) + _END
    return b"data: " + orjson.dumps(error_body(path, message, "engine_crashed")) + _END + b"data: [DONE]" + _END


def error_body(path: str, message: str, code: str) -> dict[str, object]:
    """An error answer with a status, in the protocol of `path`."""
    if path.startswith("/v1/messages"):
        return {"type": "error", "error": {"type": "api_error", "message": message}}
    return {"error": {"message": message, "type": "server_error", "param": None, "code": code}}
