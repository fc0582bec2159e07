"""What HTTP handlers may use: the parts below, the served model's facts, and the resolved settings.

`app` builds one `ServerContext` per application and hangs it on `app.state`; nothing here is global, so two servers can
live in one process. Used on the asyncio thread only.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Protocol

from starlette.requests import Request

from vllm_mlx.api.live import LiveRequests
from vllm_mlx.api.openai.response_store import ResponseStore
from vllm_mlx.engine.step import EngineStatus
from vllm_mlx.errors import Unavailable
from vllm_mlx.generation.adapters import AdapterRegistry
from vllm_mlx.generation.events import OutputEvent
from vllm_mlx.generation.oneshot import BesideModels, OneShots
from vllm_mlx.generation.request import GenerationRequest
from vllm_mlx.generation.tool_loop import ToolLoop, Tools
from vllm_mlx.observability.journal import Journal
from vllm_mlx.observability.metrics import Metrics
from vllm_mlx.settings import Settings


class Generation(Protocol):
    """The part of `generation.service.GenerationService` that protocols need."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[OutputEvent]:
        """Events of one generation; errors before the first event are raised at the first `__anext__`."""
        ...

    def cancel(self, request_id: str) -> bool:
        """End a generation early with what it has; False when the id is not running."""
        ...

    async def count_prompt_tokens(self, request: GenerationRequest) -> int:
        """Tokens the request's prompt would have: exactly what `generate` would report."""
        ...

    async def tokenize_prompt(self, request: GenerationRequest, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of the request's prompt, text or chat."""
        ...

    async def detokenize(self, token_ids: tuple[int, ...]) -> str:
        """Text of token ids, special tokens shown."""
        ...

    def token_text(self, token_id: int) -> str:
        """Text of one token by itself."""
        ...


@dataclass(frozen=True, slots=True)
class ServedModel:
    """Facts of the loaded model, as far as clients may know them. None: unknown.

    `context_tokens` is what is enforced, `max_context_tokens` what the model itself could take. With an `adapter`,
    `id` is `MODEL:ADAPTER` and `base_id` the model's own. `revision` is the hub's commit, or a digest of the contents.
    """

    id: str
    fingerprint: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    model_type: str | None = None
    architecture: str | None = None
    dtype: str | None = None
    quantization: str | None = None
    context_tokens: int | None = None
    max_context_tokens: int | None = None
    vocab_size: int | None = None
    modalities: frozenset[str] = frozenset({"text"})
    has_chat_template: bool = True
    has_thinking_tokens: bool | None = None
    reasoning_parser: str | None = None
    tool_parser: str | None = None
    weights_bytes: int | None = None
    revision: str | None = None
    notes: tuple[str, ...] = ()
    runs_batched: bool = True
    shares_prefixes: bool = True
    adapter: str = ""

    @property
    def base_id(self) -> str:
        return self.id.removesuffix(f":{self.adapter}") if self.adapter else self.id

    def with_adapter(self, name: str) -> ServedModel:
        return replace(self, id=f"{self.id}:{name}", adapter=name)

    @property
    def is_multimodal(self) -> bool:
        return bool(self.modalities - {"text"})


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One of several models: its names and where it is in its life (`fleet.pool.ModelState`)."""

    model: ServedModel
    aliases: tuple[str, ...]
    state: str
    is_pinned: bool
    num_active: int
    num_waiting: int
    cost_bytes: int
    failure: str | None


class Directory(Protocol):
    """The models of a server that has several; each is loaded when a request needs it."""

    def entries(self) -> Sequence[ModelEntry]:
        """All of them, the default one first."""
        ...

    def beside_entries(self) -> Sequence[ModelEntry]:
        """Those beside the chat, of whose `model` only the id is known."""
        ...

    def find(self, name: str) -> ServedModel | None:
        """By id or alias; what is not known before a model was loaded is None in its facts."""
        ...

    def service_of(self, model_id: str) -> Generation:
        """Generates with the model, after loading it if need be."""
        ...

    def adapters_of(self, model_id: str) -> AdapterRegistry:
        """The LoRA adapters of a model, loaded or not."""
        ...

    async def load_model(self, model_id: str) -> None:
        """Have it in memory; raises ModelLoadError."""
        ...

    async def unload_model(self, model_id: str) -> bool:
        """Give its memory back once its requests have finished; False if it was not in memory."""
        ...


class McpTools(Tools, Protocol):
    """The part of `mcp_client.toolbox.Toolbox` that the API shows."""

    @property
    def connections(self) -> Sequence[Any]:
        """Each with `config` (name, transport), `state`, `tools` and `error`."""
        ...

    def tools(self) -> Sequence[Any]:
        """Each with `full_name`, `description`, `server` and `parameters`."""
        ...


class Phase(StrEnum):
    """Where the server is in its life."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(slots=True)
class ServerContext:
    """Everything a handler may reach. `app` moves `phase` and fills `service` and `model` when loading is done.

    `api_keys` maps each key's name to the key; `notes` are the sentences that `Settings.resolve` gave. `models` is None
    while the server has one model only; else `model` and `service` are the default one's.
    """

    settings: Settings = Settings()
    api_keys: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    service: Generation | None = None
    model: ServedModel | None = None
    models: Directory | None = None
    adapters: AdapterRegistry = field(default_factory=AdapterRegistry)
    beside: BesideModels = field(default_factory=BesideModels)
    oneshots: OneShots | None = None
    mcp: McpTools | None = None
    tool_loops: dict[int, ToolLoop] = field(default_factory=dict)
    read_status: Callable[[], EngineStatus] = EngineStatus
    clear_cache: Callable[[], Awaitable[int]] | None = None
    read_memory: Callable[[], Mapping[str, Any]] | None = None
    program: Mapping[str, Any] | None = None
    health_checks: Callable[[], Mapping[str, Mapping[str, Any]]] | None = None
    phase: Phase = Phase.READY
    failure: str | None = None
    live: LiveRequests = field(default_factory=LiveRequests)
    metrics: Metrics = field(default_factory=Metrics)
    journal: Journal = field(default_factory=Journal)
    responses: ResponseStore = field(default_factory=ResponseStore)
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.journal.observers.append(self.metrics.observe)
        self.journal.on_gap = self.metrics.inter_token.observe

    def require_service(self) -> Generation:
        """The generation service, or `Unavailable` saying why there is none."""
        if self.phase is Phase.LOADING or self.service is None:
            raise Unavailable("The model is still loading; try again in a few seconds.", retry_after_s=5)
        if self.phase is Phase.DRAINING:
            raise Unavailable("The server is shutting down and takes no new requests.", retry_after_s=30)
        if self.phase is Phase.FAILED:
            raise Unavailable(f"The server cannot serve: {self.failure or 'the engine has failed'}.")
        return self.service

    def service_of(self, model_id: str) -> Generation:
        """What generates with one of the server's models. Whether it may now, `require_service` says."""
        if self.models is not None:
            return self._with_tools(self.models.service_of(model_id))
        assert self.service is not None, "no model is loaded"
        return self._with_tools(self.service)

    def _with_tools(self, service: Generation) -> Generation:
        """The service, which also calls MCP tools where the operator wants it; the same one for the same service."""
        mcp = self.settings.mcp
        if self.mcp is None or not mcp.mcp_in_chat:
            return service
        if (loop := self.tool_loops.get(id(service))) is None:
            loop = ToolLoop(service, self.mcp, max_steps=mcp.mcp_max_steps, timeout_s=self.settings.limits.timeout_s)
            self.tool_loops[id(service)] = loop  # which keeps the service, and so the number
        return loop

    def adapters_of(self, model_id: str) -> AdapterRegistry:
        """The LoRA adapters of one of the server's models."""
        return self.adapters if self.models is None else self.models.adapters_of(model_id)

    def require_model(self) -> ServedModel:
        self.require_service()
        assert self.model is not None, "a service without a model"
        return self.model


async def get_context(request: Request) -> ServerContext:
    """FastAPI dependency: this application's context. Async, or FastAPI would call it on a thread of its pool."""
    context: ServerContext = request.app.state.context
    return context
