"""POST /v1/embeddings: texts or token ids to unit vectors, as numbers or base64."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from fastapi import APIRouter, Depends
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from vllm_mlx.api.beside import beside_job, find_beside, require_oneshots
from vllm_mlx.api.body import json_body, read_body
from vllm_mlx.api.context import ServerContext, get_context
from vllm_mlx.api.openai.schemas import PromptInput
from vllm_mlx.api.wire import WireModel
from vllm_mlx.errors import InvalidRequest
from vllm_mlx.generation.encoding import Computed, EncodingService

router = APIRouter(tags=["OpenAI"])

MAX_INPUTS = 2048
"""OpenAI's own limit of inputs a request."""


class EmbeddingRequest(WireModel):
    """OpenAI's body, with vLLM's `truncate_prompt_tokens`: -1 cuts an input to what the model takes."""

    model: str | None = None
    input: PromptInput
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    user: str | None = None


@router.post(
    "/v1/embeddings",
    summary="Embed texts",
    description="`input` is a text, token ids, or a list of either (at most 2048). Needs `--embedding-model`.",
    openapi_extra=json_body(EmbeddingRequest),
)
async def create_embeddings(http: Request, context: Annotated[ServerContext, Depends(get_context)]) -> Response:
    body = await read_body(http, EmbeddingRequest)
    model = find_beside(context, "embedding", body.model)
    inputs = inputs_of(body)
    cut = body.truncate_prompt_tokens
    if cut == 0:
        raise InvalidRequest("'truncate_prompt_tokens' must be -1 or at least 1.", param="truncate_prompt_tokens")
    async with beside_job(context, http, model, "embeddings") as job:
        service: EncodingService = job.service
        computed = await service.embed(
            inputs, dimensions=body.dimensions, max_tokens=service.max_tokens if cut == -1 else cut
        )
    context.metrics.beside_tokens.labels(task=model.task).inc(computed.num_tokens)
    context.metrics.truncated_inputs.inc(computed.num_truncated)
    # Millions of numbers take time to write down, which the event loop does not have.
    text = await require_oneshots(context).in_worker(lambda: _answer(computed, body.encoding_format, model.id))
    return Response(text, media_type="application/json")


def _answer(computed: Computed, encoding_format: str | None, model_id: str) -> bytes:
    is_base64 = encoding_format == "base64"
    data = [
        {"object": "embedding", "index": i, "embedding": _base64(vector) if is_base64 else vector}
        for i, vector in enumerate(np.ascontiguousarray(computed.values, np.float32))
    ]
    usage = {"prompt_tokens": computed.num_tokens, "total_tokens": computed.num_tokens}
    body = {"object": "list", "data": data, "model": model_id, "usage": usage}
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def inputs_of(body: EmbeddingRequest) -> list[str | tuple[int, ...]]:
    """The inputs of a body, in order; raises for empty and for too many ones."""
    value: Any = body.input
    if isinstance(value, str) or (value and isinstance(value[0], int)):
        value = [value]
    if not 1 <= len(value) <= MAX_INPUTS:
        raise InvalidRequest(
            f"'input' must hold between 1 and {MAX_INPUTS} inputs, not {len(value)}.",
            param="input",
            code="invalid_value",
        )
    for i, item in enumerate(value):
        if not item:
            raise InvalidRequest(f"Input {i} is empty; leave it out.", param=f"input.{i}", code="invalid_value")
    return [item if isinstance(item, str) else tuple(item) for item in value]


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
