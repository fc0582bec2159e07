"""The composition root: builds engine, generation and HTTP from `Settings`, and owns start-up and shutdown.

serve       one process: BLAS, model, MLX thread, service, HTTP server, signals
build_app   the HTTP application around a `ServerContext`; two can live in one process
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from contextlib import AbstractAsyncContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from vllm_mlx import __version__, provenance, ranks
from vllm_mlx.api import adapters, capabilities, control, dashboard, errors, gauges, health, mcp, openapi, pages, rerank
from vllm_mlx.api.access import RequestScope
from vllm_mlx.api.anthropic import messages
from vllm_mlx.api.anthropic.schemas import CountTokensRequest, MessagesRequest
from vllm_mlx.api.auth import Authentication
from vllm_mlx.api.context import Phase, ServerContext
from vllm_mlx.api.limits import BodyLimit, RateLimit
from vllm_mlx.api.openai import (
    chat,
    completions,
    embeddings,
    models,
    responses,
    schemas,
    speech,
    tokenize,
    transcriptions,
)
from vllm_mlx.api.openai.response_store import ResponseStore
from vllm_mlx.api.openai.responses_schemas import InputTokensRequest, ResponsesRequest
from vllm_mlx.backend import Backend, check_formats
from vllm_mlx.commands.status_line import StatusLine
from vllm_mlx.errors import SettingsError
from vllm_mlx.fleet.backend import FleetBackend
from vllm_mlx.guards import open_files
from vllm_mlx.lifecycle import Lifecycle, Loaded, bind, end_with_parent, is_behind_front, make_http_server
from vllm_mlx.mcp_client.config import read_config
from vllm_mlx.observability import logs
from vllm_mlx.observability.journal import ProblemHandler
from vllm_mlx.settings import ServerSettings, Settings, is_loopback
from vllm_mlx.warm import read_prompts, warm

if TYPE_CHECKING:
    from vllm_mlx.observability.tracing import Tracing

# The site map: explicit on purpose.
ROUTERS = (
    chat.router,
    completions.router,
    responses.router,
    models.router,
    adapters.router,
    tokenize.router,
    embeddings.router,
    rerank.router,
    transcriptions.router,
    speech.router,
    mcp.router,
    messages.router,
    capabilities.router,
    control.router,
    dashboard.router,
    health.router,
    pages.router,
)

WIRE_TYPES = (
    schemas.ChatCompletionRequest,
    schemas.CompletionRequest,
    ResponsesRequest,
    InputTokensRequest,
    schemas.TokenizeRequest,
    schemas.DetokenizeRequest,
    adapters.LoadAdapter,
    adapters.UnloadAdapter,
    embeddings.EmbeddingRequest,
    rerank.RerankRequest,
    rerank.ScoreRequest,
    speech.SpeechRequest,
    mcp.ExecuteRequest,
    MessagesRequest,
    CountTokensRequest,
)

SWITCH_INTERVAL_S = 0.001
DESCRIPTION = "Language and vision-language models on MLX, behind the OpenAI and Anthropic protocols."


def build_app(context: ServerContext) -> FastAPI:
    """The HTTP application around `context`."""
    server = context.settings.server
    # Outermost first. CORS is outside of authentication: a browser must be able to read a 401.
    middleware = [Middleware(RequestScope, metrics=context.metrics, journal=context.journal)]
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


def serve(settings: Settings) -> int:
    """Serve until a signal. Returns the exit code; raises one-sentence errors for what cannot be served."""
    settings, notes = settings.resolve()
    check_formats(settings)
    place = ranks.join(settings) if settings.model.distributed is not None else None
    if place is not None and place.rank:
        logs.configure(settings.server.log_level, settings.server.log_format)
        return ranks.follow(settings, place)
    warming: list[asyncio.Task[None]] = []
    prompts = read_prompts(settings.cache.warm_prompts) if settings.cache.warm_prompts else []
    server = settings.server
    handler = logs.configure(server.log_level, server.log_format)
    context = ServerContext(
        settings=settings,
        notes=notes,
        api_keys=read_api_keys(server),
        phase=Phase.LOADING,
        responses=ResponseStore(server.response_store, max_responses=server.max_stored_responses),
    )
    context.metrics.add_gauges(lambda: gauges.read(context))
    logging.getLogger("vllm_mlx").addHandler(ProblemHandler(context.journal))
    tracing = start_tracing(server, context)
    listener = bind(server)
    end_with_parent()
    port = server.port if is_behind_front() else listener.getsockname()[1]
    http = make_http_server(build_app(context), server)
    line = StatusLine(context, sys.stderr) if StatusLine.is_wanted(sys.stderr, server.log_format) else None
    if line is not None:
        line.attach(handler)

    def announce(loaded: Loaded) -> None:
        if line is not None:
            line.show("")
        print("\n".join(announcement(context, port, loaded)), flush=True)
        if prompts:
            warming.append(asyncio.get_running_loop().create_task(warm(context, prompts), name="warm prompts"))

    def load() -> Loaded:
        context.program = provenance.describe()  # on the loading thread: git is asked, which takes a moment
        loaded = FleetBackend.load(settings) if settings.is_pool else Backend.load(settings, place)
        open_files.widen()
        return loaded

    lifecycle = Lifecycle(
        http,
        listener,
        context,
        load,
        announce,
        shutdown_timeout_s=server.shutdown_timeout,
    )
    toolbox = open_toolbox(settings, context)
    # Python lets a thread run for 5 ms before another gets its turn; the MLX thread must not wait that long to launch.
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    with asyncio.Runner(loop_factory=http.config.get_loop_factory()) as runner:
        runner.run(_run(lifecycle, line, toolbox))
        if tracing is not None:
            tracing.close()
        if lifecycle.is_stuck:
            # A thread is inside MLX and cannot be interrupted; an ordinary exit would wait for it or crash under it.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
    return 0


def start_tracing(server: ServerSettings, context: ServerContext) -> Tracing | None:
    """Traces of every generation, where the operator names a collector."""
    if server.otlp_endpoint is None:
        return None
    try:
        from vllm_mlx.observability.tracing import Tracing, exporter_to  # an optional extra
    except ImportError as error:
        raise SettingsError(
            f"--otlp-endpoint needs OpenTelemetry ({error}); install vllm-mlx with the extra `otel`."
        ) from None
    tracing = Tracing(exporter_to(server.otlp_endpoint), __version__)
    context.journal.observers.append(tracing.observe)
    return tracing


async def _run(
    lifecycle: Lifecycle, line: StatusLine | None, toolbox: AbstractAsyncContextManager[object] | None
) -> None:
    """The server's life, with the status line beside it where there is a terminal, and MCP servers where there are."""
    showing = asyncio.create_task(line.run(), name="status line") if line is not None else None
    try:
        async with toolbox or nullcontext():
            await lifecycle.run()
    finally:
        if showing is not None:
            showing.cancel()
            await asyncio.wait({showing})


def open_toolbox(settings: Settings, context: ServerContext) -> AbstractAsyncContextManager[object] | None:
    """The MCP servers of --mcp-config, put into `context`; they are connected to when it is entered."""
    mcp = settings.mcp
    if mcp.mcp_config is None:
        return None
    if find_spec("mcp") is None:
        raise SettingsError("--mcp-config needs the package mcp; install it with `pip install 'mcp>=2,<3'`.")
    servers = read_config(mcp.mcp_config)
    from vllm_mlx.mcp_client.toolbox import Toolbox  # an optional package, slow to import

    toolbox = Toolbox(servers, timeout_s=mcp.mcp_timeout, observe=context.metrics.observe_mcp_call)
    context.mcp = toolbox
    return toolbox


def read_api_keys(server: ServerSettings) -> dict[str, str]:
    """Name → key: from --api-key (named `default`), and one for each line of --api-key-file."""
    keys = {"default": server.api_key} if server.api_key else {}
    if server.api_key_file is None:
        return keys
    try:
        lines = Path(server.api_key_file).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--api-key-file {server.api_key_file} cannot be read: {error}.") from error
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, colon, key = line.partition(":")
        name, key = (name.strip(), key.strip()) if colon else (f"key{number}", line)
        if not key or name in keys:
            raise SettingsError(f"--api-key-file, line {number}: write KEY or NAME: KEY, each name once.")
        keys[name] = key
    if not keys:
        raise SettingsError(f"--api-key-file {server.api_key_file} holds no key.")
    return keys


def announcement(context: ServerContext, port: int, loaded: Loaded) -> list[str]:
    """What a person sees when the server is ready: what was loaded, where it listens, how to call it, what is open."""
    server = context.settings.server
    scheme = "https" if server.ssl_certfile else "http"
    host = {"0.0.0.0": "localhost", "::": "localhost"}.get(server.host, server.host)
    base = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
    key = " -H 'authorization: Bearer YOUR_KEY'" if context.api_keys else ""
    body = '{"model":"default","messages":[{"role":"user","content":"Reply with pong"}],"max_tokens":32}'
    return [
        f"vllm-mlx {__version__} serves {loaded.describe()}",
        f"  Listening   {base}/v1 (OpenAI), {base} (Anthropic), {base}/docs",
        *([f"  Look        {base}/ (chat), {base}/dashboard"] if pages.has_page() else ()),
        f"  Try         curl -sS {base}/v1/chat/completions -H 'content-type: application/json'{key} -d '{body}'",
        *(f"  Note        {note}" for note in context.notes),
    ]
