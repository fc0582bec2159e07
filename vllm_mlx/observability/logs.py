"""How log lines look: for people, or one JSON object a line for machines. Set up once, by `app`, for the process."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "color_message"}


class TextFormatter(logging.Formatter):
    """`09:15:02 INFO  vllm_mlx.app: message`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S")


class JsonFormatter(logging.Formatter):
    """One object a line; what `extra=` carried becomes fields."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields.update((key, value) for key, value in record.__dict__.items() if key not in _STANDARD)
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str, ensure_ascii=False)


def configure(level: str = "info", log_format: str = "text") -> logging.StreamHandler[Any]:
    """Send the program's and uvicorn's log lines to stderr. Calling it again replaces the earlier set-up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    for name in ("vllm_mlx", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        # uvicorn tells at `info` what our own lines say better.
        logger.setLevel("WARNING" if name == "uvicorn" and level == "info" else level.upper())
    # Our own access line (api/access.py) has the request id and the time; uvicorn's would be a second one.
    logging.getLogger("uvicorn.access").disabled = True
    return handler
