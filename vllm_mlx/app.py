"""The composition root: builds engine, generation and HTTP from `Settings`, and owns start-up and shutdown.

serve       one process: BLAS, model, MLX thread, service, HTTP server, signals
build_app   the HTTP application around a `ServerContext`; two can live in one process
"""

from __future__ import annotations

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from vllm_mlx import __version__
from vllm_mlx.api import capabilities, control, errors, health, openapi, pages
from vllm_mlx.api.access import RequestScope
from vllm_mlx.api.auth import Authentication
from vllm_mlx.api.context import ServerContext
from vllm_mlx.api.limits import BodyLimit, RateLimit
from vllm_mlx.api.openai import chat, completions, models, schemas, tokenize
from vllm_mlx.settings import is_loopback

# The site map: explicit on purpose.
ROUTERS = (
    chat.router,
    completions.router,
    models.router,
    tokenize.router,
    capabilities.router,
    control.router,
    health.router,
    pages.router,
)

WIRE_TYPES = (
    schemas.ChatCompletionRequest,
    schemas.CompletionRequest,
    schemas.TokenizeRequest,
    schemas.DetokenizeRequest,
)

DESCRIPTION = "Language and vision-language models on MLX, behind the OpenAI and Anthropic protocols."


def build_app(context: ServerContext) -> FastAPI:
    """The HTTP application around `context`."""
    server = context.settings.server
    # Outermost first. CORS is outside of authentication: a browser must be able to read a 401.
    middleware = [Middleware(RequestScope, metrics=context.metrics)]
    if server.cors_origin:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(server.cors_origin),
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after"],
            )
        )
    middleware.append(
        Middleware(
            Authentication,
            api_keys=context.api_keys,
            shared_cache=server.shared_cache,
            is_loopback=is_loopback(server.host),
        )
    )
    if server.rate_limit:
        middleware.append(Middleware(RateLimit, requests_per_minute=server.rate_limit))
    middleware.append(Middleware(BodyLimit, max_body_bytes=int(server.max_body_mb * 2**20)))

    app = FastAPI(
        title="vllm-mlx",
        version=__version__,
        description=DESCRIPTION,
        middleware=middleware,
        redirect_slashes=False,
        redoc_url=None,
    )
    app.state.context = context
    errors.install(app)
    for router in ROUTERS:
        app.include_router(router)
    openapi.install(app, WIRE_TYPES)
    return app
