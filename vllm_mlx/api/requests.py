"""What every generation route does alike: which model, which client, trust, open the choices, answer or stream."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from vllm_mlx.api.choices import Indexed, collect_choices, open_choices
from vllm_mlx.api.context import Directory, ServedModel, ServerContext
from vllm_mlx.api.errors import HttpError, request_id_of
from vllm_mlx.api.live import LiveRequest
from vllm_mlx.api.sse import EventStream, Renderer, watch_client
from vllm_mlx.api.wire import PRIORITIES
from vllm_mlx.engine.request import BACKGROUND
from vllm_mlx.errors import InvalidRequest, UnknownModel
from vllm_mlx.generation.events import Message
from vllm_mlx.generation.request import GenerationRequest

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: for fairness, rate limits and cache namespaces. Set by `auth`, read from the ASGI scope."""

    name: str = ""
    namespace: str = ""
    is_authenticated: bool = False
    is_local: bool = False


def caller_of(request: Request) -> Caller:
    caller = (request.scope.get("state") or {}).get("caller")
    return caller if isinstance(caller, Caller) else Caller()


def find_model(context: ServerContext, name: str | None, adapter: str | None = None) -> ServedModel:
    """The model that a request names, with the adapter it names: in its `adapter` field, or as `MODEL:ADAPTER`."""
    base, in_name = _split_adapter(context, name)
    model = _find_base(context, base)
    wanted = adapter or in_name
    if not wanted:
        return model
    context.adapters_of(model.id).check(wanted, "adapter" if adapter else "model")
    return model.with_adapter(wanted)


def _split_adapter(context: ServerContext, name: str | None) -> tuple[str | None, str]:
    """Model and adapter of a name. Other people's names have colons too (`llama3:8b`): those are no adapters."""
    if name is None or ":" not in name:
        return name, ""
    base, _, adapter = name.rpartition(":")
    default = context.require_model()
    known = {default.id, "default", *(alias.split("=", 1)[0] for alias in context.settings.server.model_alias)}
    if context.models is not None:
        if context.models.find(name) is not None:
            return name, ""
        known |= {base} if context.models.find(base) is not None else set()
    elif name == default.id:
        return name, ""
    return (base, adapter) if base in known else (name, "")


def _find_base(context: ServerContext, name: str | None) -> ServedModel:
    """The model of a name. A server with one model serves any name, unless it is strict about it."""
    model = context.require_model()
    server = context.settings.server
    if name != model.id and (beside := context.beside.named(name)):
        raise InvalidRequest(
            f"The model '{name}' is served for {beside[0].task}, not for chat; '{model.id}' is.",
            param="model",
            code="invalid_value",
        )
    if context.models is not None:
        return _find_among(context, context.models, name)
    if not server.strict_model_id or name == model.id:
        return model
    aliases = dict(alias.split("=", 1) for alias in server.model_alias)
    if name is not None and aliases.get(name) in (model.id, "default"):
        return model
    wanted = f"The model '{name}' is not served here" if name else "This server needs the model's exact id"
    raise UnknownModel(f"{wanted}; it serves '{model.id}'.", param="model", code="model_not_found")


def _find_among(context: ServerContext, models: Directory, name: str | None) -> ServedModel:
    server = context.settings.server
    aliases = dict(alias.split("=", 1) for alias in server.model_alias)
    wanted = aliases.get(name, name) if name is not None else None
    if wanted is None or wanted == "default":
        if not server.strict_model_id:
            return context.require_model()
    elif (found := models.find(wanted)) is not None:
        return found
    elif not server.strict_model_id and (len(models.entries()) == 1 or is_background(context, name)):
        return context.require_model()
    ids = ", ".join(f"'{entry.model.id}'" for entry in models.entries())
    wrong = f"The model '{name}' is not served here" if name else "This server needs a model's exact id"
    raise UnknownModel(f"{wrong}; it serves {ids}.", param="model", code="model_not_found")


PRIORITY_HEADER = "x-priority"


def priority_of(http: Request) -> int | None:
    """What the header says of the request's priority; a field of the body wins over it."""
    value = http.headers.get(PRIORITY_HEADER)
    if value is None:
        return None
    name = value.strip().lower()
    if name in PRIORITIES:
        return PRIORITIES[name]
    if name.removeprefix("-").isdecimal() and len(name) < 10:
        return int(name)
    raise InvalidRequest(
        f"The {PRIORITY_HEADER} header is 'interactive', 'background' or a whole number, not {value[:40]!r}.",
        param=PRIORITY_HEADER,
        code="invalid_value",
    )


def is_background(context: ServerContext, name: str | None) -> bool:
    """Whether an agent asks under a small model's name, as it does for titles and summaries that nobody waits for."""
    model = context.require_model()
    if name is None or name in (model.id, "default"):
        return False
    if context.models is not None and context.models.find(name) is not None:
        return False  # a model of its own
    return any(fnmatchcase(name, pattern) for pattern in context.settings.agents.background_model)


SESSION_HEADERS = (
    "x-session-id", "x-claude-code-session-id", "session-id", "thread-id", "x-session-affinity", "x-conversation-id",
)  # fmt: skip


def session_of(http: Request) -> str:
    """The agent's own name of its conversation, as far as it is fit to be shown; empty when it gives none."""
    for name in SESSION_HEADERS:
        value = http.headers.get(name, "")[:128]
        if value and value.isprintable():
            return value
    return ""


def check_trust(context: ServerContext, caller: Caller, override: str | None) -> None:
    """A request may change the repetition policy if its sender is known, or is on this machine with the server."""
    if override is None or override == context.settings.guards.repetition_policy:
        return
    trusted = caller.is_authenticated or caller.is_local or context.settings.server.trust_requests_when_auth_disabled
    if not trusted:
        raise HttpError(
            403,
            "'repetition_policy_override' is honoured for authenticated and local callers only; leave it out.",
            code="untrusted_override",
        )


def check_choices(context: ServerContext, num_choices: int) -> None:
    limit = MAX_CHOICES
    if num_choices > limit:
        raise InvalidRequest(
            f"This request asks for {num_choices} completions at once; the limit is {limit}.",
            param="n",
            code="invalid_value",
        )


MAX_CHOICES = 128


@dataclass(frozen=True, slots=True)
class Job:
    """A validated request on its way to the service. `asked_model` is the name that the client used."""

    id: str
    route: str
    model: ServedModel
    requests: Sequence[GenerationRequest]
    is_stream: bool
    asked_model: str | None = None
    owner: str = ""
    snapshot: Callable[[], dict[str, Any]] | None = None


async def run_stream(context: ServerContext, http: Request, job: Job, renderer: Renderer) -> Response:
    """Open the generations (errors until here have a status) and stream them."""
    async with watch_client(http.receive):
        events = await open_job(context, http, job)
    return EventStream(events, renderer)


async def run_whole(context: ServerContext, http: Request, job: Job) -> list[Message]:
    """Every generation's message; a client that leaves ends them."""
    async with watch_client(http.receive):
        return await collect_choices(await open_job(context, http, job), len(job.requests))


async def run_rendered(context: ServerContext, http: Request, job: Job, renderer: Renderer) -> None:
    """Tell the whole job to the renderer of a stream, for an answer that is made of what a stream would have said."""
    async with watch_client(http.receive):
        async with aclosing(await open_job(context, http, job)) as events:
            async for index, event in events:
                renderer.render(index, event)


async def open_job(context: ServerContext, http: Request, job: Job) -> AsyncGenerator[Indexed, None]:
    """The job's events; iterate them or close them."""
    requests = job.requests
    priority = priority_of(http)
    if priority is None and is_background(context, job.asked_model):
        priority = BACKGROUND
    if priority is not None:
        requests = [replace(r, priority=r.priority or priority) for r in requests]
    if job.model.adapter:
        requests = [replace(r, adapter=job.model.adapter) for r in requests]
    entry = LiveRequest(
        id=job.id,
        request_id=request_id_of(http.scope) or job.id,
        route=job.route,
        model=job.model.id,
        base_model=job.model.base_id,
        is_stream=job.is_stream,
        generation_ids=tuple(request.id for request in job.requests),
        client=caller_of(http).name,
        owner=job.owner,
        session=session_of(http),
        traceparent=http.headers.get("traceparent", "")[:128],
        snapshot=job.snapshot,
    )
    service = context.service_of(job.model.base_id)
    http.scope.setdefault("state", {})["is_generation"] = True
    if context.settings.server.log_prompts:
        for request in requests:
            _log_prompt(request)
    return await open_choices(
        service,
        requests,
        live=context.live,
        entry=entry,
        journal=context.journal,
        in_turn=context.settings.sampling.deterministic,
    )


NUM_PROMPT_CHARS_LOGGED = 500


def _log_prompt(request: GenerationRequest) -> None:
    """Only where the operator asked for it."""
    text = request.messages[-1].text if request.messages else request.prompt
    shown = text[:NUM_PROMPT_CHARS_LOGGED] if isinstance(text, str) else f"{len(text or ())} token ids"
    log.info("%s asks: %r", request.id, shown, extra={"id": request.id, "prompt": shown})


def json_response(body: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(body), status, media_type="application/json")
