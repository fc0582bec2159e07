"""POST /v1/rerank in Cohere's and Jina's shape, and /v1/score in vLLM's: how well documents answer a query."""

from __future__ import annotations

import time
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends
from pydantic import Discriminator, Field, Tag
from starlette.requests import Request
from starlette.responses import Response

from vllm_mlx.api.beside import beside_job, find_beside
from vllm_mlx.api.body import json_body, read_body
from vllm_mlx.api.context import ServerContext, get_context
from vllm_mlx.api.openai.schemas import StringOrStrings
from vllm_mlx.api.requests import json_response
from vllm_mlx.api.wire import WireModel
from vllm_mlx.errors import InvalidRequest
from vllm_mlx.generation.encoding import EncodingService, sigmoid
from vllm_mlx.generation.oneshot import BesideModel

router = APIRouter(tags=["Rerank"])

Context = Annotated[ServerContext, Depends(get_context)]

MAX_DOCUMENTS = 10_000


class Document(WireModel):
    text: str


DocumentOrText = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[Document, Tag("<object>")],
    Discriminator(lambda value: "<text>" if isinstance(value, str) else "<object>"),
]


class RerankRequest(WireModel):
    """`instruction` is for Qwen3-Reranker. Without `return_documents`, /v1/rerank returns them and /v2/rerank not."""

    model: str | None = None
    query: str = Field(min_length=1)
    documents: list[DocumentOrText]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool | None = None
    max_tokens_per_doc: Annotated[int, Field(ge=1)] | None = None
    instruction: Annotated[str, Field(min_length=1)] | None = None


class ScoreRequest(WireModel):
    """vLLM's body: one text against one or many, or two lists of equal length, pair by pair."""

    model: str | None = None
    text_1: StringOrStrings
    text_2: StringOrStrings
    instruction: Annotated[str, Field(min_length=1)] | None = None


_RERANK: dict[str, Any] = {
    "summary": "Order documents by how well they answer a query",
    "description": "Cohere's and Jina's shape; documents are texts or objects with `text`. Needs `--rerank-model`.",
    "openapi_extra": json_body(RerankRequest),
}


@router.post("/v1/rerank", **_RERANK)
@router.post("/rerank", include_in_schema=False)
async def rerank(http: Request, context: Context) -> Response:
    return await _rerank(http, context, returns_documents=True)


@router.post("/v2/rerank", **_RERANK)
async def rerank_v2(http: Request, context: Context) -> Response:
    return await _rerank(http, context, returns_documents=False)


async def _rerank(http: Request, context: ServerContext, *, returns_documents: bool) -> Response:
    body = await read_body(http, RerankRequest)
    model = find_beside(context, "rerank", body.model)
    documents = [item if isinstance(item, str) else item.text for item in body.documents]
    if not 1 <= len(documents) <= MAX_DOCUMENTS:
        raise InvalidRequest(
            f"'documents' must hold between 1 and {MAX_DOCUMENTS} documents, not {len(documents)}.",
            param="documents",
            code="invalid_value",
        )
    async with beside_job(context, http, model, "rerank") as job:
        service: EncodingService = job.service
        computed = await service.score(
            [(body.query, document) for document in documents],
            instruction=body.instruction,
            max_tokens_per_document=body.max_tokens_per_doc,
        )
    context.metrics.beside_tokens.labels(task=model.task).inc(computed.num_tokens)
    if body.return_documents is not None:
        returns_documents = body.return_documents
    # Ordered by the raw scores: a sigmoid makes equals of what lies far out.
    order = np.argsort(-computed.values, kind="stable")[: body.top_n]
    scores = sigmoid(computed.values)
    results = [
        {
            "index": int(i),
            "relevance_score": float(scores[i]),
            **({"document": {"text": documents[i]}} if returns_documents else {}),
        }
        for i in order
    ]
    return json_response(
        {
            "id": job.id,
            "model": model.id,
            "results": results,
            "usage": {"prompt_tokens": computed.num_tokens, "total_tokens": computed.num_tokens},
            "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
        }
    )


@router.post(
    "/v1/score",
    summary="Score pairs of texts",
    description="vLLM's shape. A reranker gives its score; an embedding model, where there is no reranker or where it "
    "is named, the cosine of the two vectors.",
    openapi_extra=json_body(ScoreRequest),
)
@router.post("/score", include_in_schema=False)
async def score(http: Request, context: Context) -> Response:
    body = await read_body(http, ScoreRequest)
    pairs = _pairs(body)
    model = _scorer(context, body.model)
    async with beside_job(context, http, model, "score") as job:
        service: EncodingService = job.service
        if model.task == "rerank":
            computed = await service.score(pairs, instruction=body.instruction)
            num_tokens = computed.num_tokens
            values = sigmoid(computed.values) if service.encoder.has_sigmoid else computed.values
        else:
            texts = list(dict.fromkeys(text for pair in pairs for text in pair))
            computed = await service.embed(texts)
            num_tokens = computed.num_tokens
            vectors = dict(zip(texts, computed.values, strict=True))
            values = np.array([np.dot(vectors[a], vectors[b]) for a, b in pairs])
    context.metrics.beside_tokens.labels(task=model.task).inc(num_tokens)
    return json_response(
        {
            "id": job.id,
            "object": "list",
            "created": int(time.time()),
            "model": model.id,
            "data": [{"index": i, "object": "score", "score": float(value)} for i, value in enumerate(values)],
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }
    )


def _scorer(context: ServerContext, name: str | None) -> BesideModel:
    """The reranker; or the embedding model where it is named, or alone."""
    embedder = context.beside.of_task("embedding")
    is_named = embedder is not None and embedder in context.beside.named(name)
    if embedder is not None and (is_named or context.beside.of_task("rerank") is None):
        return find_beside(context, "embedding", name)
    return find_beside(context, "rerank", name)


def _pairs(body: ScoreRequest) -> list[tuple[str, str]]:
    firsts = [body.text_1] if isinstance(body.text_1, str) else body.text_1
    seconds = [body.text_2] if isinstance(body.text_2, str) else body.text_2
    if len(firsts) == 1 and len(seconds) > 1:
        firsts = firsts * len(seconds)
    if not seconds or len(firsts) != len(seconds) or len(seconds) > MAX_DOCUMENTS:
        raise InvalidRequest(
            f"'text_1' and 'text_2' must be one text and one or many, or two lists of equal length (at most "
            f"{MAX_DOCUMENTS}); they have {len(firsts)} and {len(seconds)}.",
            param="text_2",
            code="invalid_value",
        )
    for name, texts in (("text_1", firsts), ("text_2", seconds)):
        if "" in texts:
            raise InvalidRequest(
                f"'{name}.{texts.index('')}' is empty; leave it out.", param=name, code="invalid_value"
            )
    return list(zip(firsts, seconds, strict=True))
