"""What an answer is called and when it was made: random names and the clock, or, under --deterministic, neither.

A deterministic server answers the same request with the same bytes, so its answers are named by the request's content
and dated by the model. asyncio thread.
"""

from __future__ import annotations

import hashlib
import time
import uuid

from pydantic import BaseModel

from vllm_mlx.api.context import ServedModel, ServerContext


def answer_id(context: ServerContext, prefix: str, body: BaseModel) -> str:
    """A name for the answer to `body`, unlike that of any request that is live now."""
    if not context.settings.sampling.deterministic:
        return f"{prefix}{uuid.uuid4().hex}"
    content = f"{type(body).__name__}:{body.model_dump_json(exclude_unset=True)}"
    number = 0
    while context.live.find(id := prefix + _digest(f"{number}:{content}", 32)) is not None:
        number += 1  # the same request is being answered already
    return id


def created(context: ServerContext, model: ServedModel) -> int:
    """Seconds since 1970, for the answer's `created`."""
    if context.settings.sampling.deterministic:
        return model.created
    return int(time.time())


def call_id(prefix: str, answer: str, choice: int, call: int) -> str:
    """A name for a tool call: as unlike any other as the answer's own, and the same where the answer's is."""
    return prefix + _digest(f"{answer}/{choice}/{call}", 24)


def _digest(text: str, length: int) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:length]
