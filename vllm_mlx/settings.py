"""Every setting of the program: one frozen dataclass of frozen groups, where one field is one flag, one environment
name, one `--help` line and one row of docs/configuration.md (`options.py` derives all four from the metadata here).

`Settings.resolve` makes every derived decision and refuses contradictions (`resolution.py`).
"""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


class ModelFacts(Protocol):
    """What `resolve` asks of a loaded model; `models.base.ModelProfile` fits."""

    @property
    def context_tokens(self) -> int | None: ...


@dataclass(frozen=True, slots=True)
class Option:
    """How an operator writes one field, and which values make sense.

    `flag` None is a positional argument. `off_flag` is the spelling that makes a boolean false. `minimum` and `maximum`
    are inclusive, `above` is exclusive. A `secret` never appears in logs or notes.
    """

    help: str
    flag: str | None = None
    aliases: tuple[str, ...] = ()
    off_flag: str | None = None
    choices: tuple[str, ...] = ()
    metavar: str | None = None
    env: str | None = None
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    secret: bool = False


def option(default: Any, help: str, flag: str | None, **rest: Any) -> Any:
    """A settings field: its default, its help line, its flag and what else `Option` holds."""
    return field(default=default, metadata={"option": Option(help=help, flag=flag, **rest)})


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Where the server listens, who may call it, and what it logs."""

    host: str = option("127.0.0.1", "Address to listen on.", "--host")
    localhost: bool = option(False, "Listen on 127.0.0.1, whatever --host says.", "--localhost")
    port: int = option(8000, "Port to listen on; 0 lets the system choose.", "--port", minimum=0, maximum=65535)
    api_key: str | None = option(
        None, "Key that callers must send as `Authorization: Bearer KEY` or `x-api-key: KEY`. It shows in the process "
        "list; the environment variable or --api-key-file does not.", "--api-key", metavar="KEY", secret=True)
    api_key_file: str | None = option(
        None, "File with one key a line, each optionally named (`alice: KEY`). Each key has a prefix cache of its own.",
        "--api-key-file", metavar="FILE")
    shared_cache: bool = option(
        False, "Let all keys share one prefix cache. Faster, but response times then tell one caller what another "
        "has asked.", "--shared-cache")
    rate_limit: int = option(
        0, "Requests a minute and caller (key, else address); 0 is no limit.", "--rate-limit", minimum=0)
    trust_requests_when_auth_disabled: bool = option(
        False, "Honour a request's own repetition policy even on a public address without keys.",
        "--trust-requests-when-auth-disabled")
    strict_model_id: bool = option(
        False, "Answer only requests that name the served model; otherwise any id, or \"default\", is served.",
        "--strict-model-id")
    served_model_name: str | None = option(
        None, "Name of the model in the API instead of the MODEL argument.", "--served-model-name", metavar="NAME")
    model_alias: tuple[str, ...] = option(
        (), "Also answer requests for NAME, with TARGET (the served model or \"default\"). May be repeated.",
        "--model-alias", metavar="NAME=TARGET")
    response_store: str | None = option(
        None, "SQLite file that keeps the answers of /v1/responses across restarts; otherwise they are kept in memory.",
        "--response-store", metavar="FILE")
    max_stored_responses: int = option(
        1000, "Answers of /v1/responses kept for `previous_response_id` and retrieval, the least used forgotten first; "
        "0 keeps none.", "--max-stored-responses", minimum=0)
    cors_origin: tuple[str, ...] = option(
        (), "Browser origin that may call the API, or `*`. May be repeated.", "--cors-origin", metavar="ORIGIN")
    max_body_mb: float = option(64.0, "Largest request body, in MiB.", "--max-body-mb", above=0)
    ssl_certfile: str | None = option(None, "TLS certificate chain (PEM).", "--ssl-certfile", metavar="FILE")
    ssl_keyfile: str | None = option(None, "TLS private key (PEM).", "--ssl-keyfile", metavar="FILE")
    ssl_keyfile_password: str | None = option(
        None, "Password of the TLS private key.", "--ssl-keyfile-password", metavar="TEXT", secret=True)
    shutdown_timeout: float = option(
        30.0, "Seconds that running requests may take to finish after SIGTERM before they are cancelled.",
        "--shutdown-timeout", minimum=0, metavar="S")
    engine_process: bool = option(
        False, "Compute in a process of its own, which is started again when it crashes.", "--engine-process")
    log_level: str = option(
        "info", "How much is logged.", "--log-level", choices=("debug", "info", "warning", "error"))
    log_format: str = option("text", "Log lines for people or for machines.", "--log-format", choices=("text", "json"))
    log_prompts: bool = option(
        False, "Log the beginning of each prompt. Without it no text of prompts and answers is logged.",
        "--log-prompts")
    otlp_endpoint: str | None = option(
        None, "Send a trace of each generation to this OpenTelemetry collector, such as http://localhost:4318 (needs "
        "the extra `otel`).", "--otlp-endpoint", metavar="URL")


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """Which model is served, and how it is found and loaded."""

    model: str = option("demo", "Model folder, hub id, or `demo`, the built-in one.", None, metavar="MODEL")
    more_models: tuple[str, ...] = option(
        (), "More models to serve beside it, right behind it; each is loaded when a request names it.", None,
        metavar="MODEL")
    revision: str | None = option(None, "Branch, tag or commit of a hub model.", "--revision", metavar="REV")
    mllm: bool | None = option(
        None, "Load as a multimodal model, or (--no-mllm) as a text model; otherwise the model's own files decide.",
        "--mllm", off_flag="--no-mllm")
    dtype: str = option(
        "auto", "Type of the weights in memory. `auto` keeps the checkpoint's on a GPU; on a CPU it takes float32, and "
        "unpacks quantised weights, if memory allows. `keep` never converts.", "--dtype",
        choices=("auto", "float32", "bfloat16", "float16", "keep"))
    distributed: str | None = option(
        None, "Compute the model in several processes, started by `mlx.launch` or `mpirun`: each has a part of every "
        "layer (tensor), or some of the layers (pipeline).", "--distributed", choices=("tensor", "pipeline"))
    distributed_timeout: float = option(
        120.0, "Seconds a step may take before a process counts as stuck, and all end.", "--distributed-timeout",
        above=0, metavar="S")
    adapter: tuple[str, ...] = option(
        (), "LoRA adapter (folder or hub id) to load with the model; a request uses it as model `MODEL:NAME` or by its "
        "`adapter` field. May be repeated.", "--adapter", metavar="NAME=PATH")
    trust_remote_code: bool = option(
        False, "Run Python code that the model's folder brings along (tokenizers, processors).", "--trust-remote-code")
    download_timeout: float = option(
        300.0, "Seconds without a byte before a download attempt counts as stalled.", "--download-timeout",
        above=0, metavar="S")
    download_retries: int = option(
        3, "How often a failed download is tried again. With 0 a broken connection is not resumed either.",
        "--download-retries", minimum=0)
    tune_profile: bool = option(
        True, "Use the settings that `vllm-mlx tune` found best for this model on this machine. Flags win over them.",
        "--tune-profile", off_flag="--no-tune-profile")
    offline: bool = option(False, "Never use the network; models come from folders and the local cache.", "--offline")


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """Several models in one server: which, and what they may take together."""

    models_config: str | None = option(
        None, "YAML file that lists models with ids, aliases and settings of their own; see docs/several-models.md.",
        "--models-config", metavar="FILE")
    memory_budget_gb: float | None = option(
        None, "GiB that the loaded models may take together, with their keys and values; otherwise 80 % of what the "
        "machine has free at start. The least recently used idle model makes room for another.", "--memory-budget-gb",
        above=0, metavar="GIB")
    idle_unload_seconds: float | None = option(
        None, "Seconds without a request after which a model's memory is given back; otherwise it stays.",
        "--idle-unload-seconds", above=0, metavar="S")


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """Sampling where a request leaves it open. A request's own value wins, then these, then the model's
    generation_config.json, then the built-in default."""

    default_temperature: float | None = option(
        None, "Temperature where the request names none.", "--default-temperature", minimum=0, maximum=100)
    default_top_p: float | None = option(
        None, "top_p where the request names none.", "--default-top-p", above=0, maximum=1)
    default_top_k: int | None = option(
        None, "top_k where the request names none; 0 is off.", "--default-top-k", minimum=0)
    default_min_p: float | None = option(
        None, "min_p where the request names none.", "--default-min-p", minimum=0, maximum=1)
    default_presence_penalty: float | None = option(
        None, "presence_penalty where the request names none.", "--default-presence-penalty", minimum=-2, maximum=2)
    default_frequency_penalty: float | None = option(
        None, "frequency_penalty where the request names none.", "--default-frequency-penalty", minimum=-2, maximum=2)
    default_repetition_penalty: float | None = option(
        None, "repetition_penalty where the request names none; 1 is off.", "--default-repetition-penalty", above=0,
        maximum=10)
    default_chat_template_kwargs: Mapping[str, Any] | None = option(
        None, "JSON object given to the chat template, under the request's own chat_template_kwargs.",
        "--default-chat-template-kwargs", metavar="JSON")
    frequency_penalty_mode: str = option(
        "openai", "Meaning of frequency_penalty: OpenAI's (subtracted once for each time a token was generated), or "
        "`repetition`, which turns a value of f into a repetition_penalty of 1 + f.", "--frequency-penalty-mode",
        choices=("openai", "repetition"))
    deterministic: bool = option(
        False, "The same bytes on every run: greedy whatever requests say, one row, whole responses one after the "
        "other, nothing reused from earlier prompts.", "--deterministic")


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """Keys and values: their precision, and what is kept for reuse by later prompts."""

    prefix_cache: bool = option(
        True, "Keep the keys and values of earlier prompts, and reuse them for prompts that begin alike.",
        "--enable-prefix-cache", off_flag="--disable-prefix-cache")
    cache_strategy: str = option(
        "auto", "Accepted for its older names; there is one prefix cache, bounded by bytes, and `auto` is it.",
        "--cache-strategy", choices=("auto", "memory-aware", "paged", "legacy"))
    cache_memory_mb: int | None = option(
        None, "Bytes the prefix cache may hold, in MiB; otherwise --cache-memory-percent decides.",
        "--cache-memory-mb", minimum=1)
    cache_memory_percent: float = option(
        0.20, "Share of the memory available at start that the prefix cache may hold (at least 100 MiB).",
        "--cache-memory-percent", above=0, maximum=1)
    block_size: int = option(
        16, "Tokens a block: the grain in which prefixes are shared.", "--paged-cache-block-size",
        aliases=("--block-size",), minimum=8, maximum=4096)
    kv_bits: int | None = option(
        None, "Bits of quantised keys and values; otherwise they are not quantised.", "--kv-bits",
        choices=("8", "4"))
    kv_group_size: int = option(
        64, "Values that share one scale when keys and values are quantised.", "--kv-group-size",
        aliases=("--kv-cache-quantization-group-size",), choices=("32", "64", "128"))
    disk_cache: str | None = option(
        None, "Folder of a second tier of the prefix cache, which outlives the process: prefixes that were used twice "
        "or are long are written there, and read back instead of being computed. One server a folder.", "--disk-cache",
        metavar="DIR")
    disk_cache_gb: float = option(
        20.0, "Bytes the disk cache may hold, in GiB; what was not used for longest goes first.", "--disk-cache-gb",
        above=0)
    disk_cache_min_tokens: int = option(
        1024, "Prefixes of so many tokens are written at their first use, shorter ones at their second.",
        "--disk-cache-min-tokens", minimum=1)
    warm_prompts: str | None = option(
        None, "File of prompts that are computed before anybody asks them: JSON lines, each the body of a chat or of a "
        "completion.", "--warm-prompts", metavar="FILE")


@dataclass(frozen=True, slots=True)
class BatchSettings:
    """How many sequences are computed together, and how much of them in one step."""

    runtime_mode: str = option(
        "auto", "`simple` computes one sequence at a time, `batched` up to --max-num-seqs; `auto` starts at one and "
        "widens while the server runs.", "--runtime-mode", choices=("auto", "simple", "batched"))
    runtime_mode_threshold: int = option(
        2, "Concurrent requests at which `auto` begins to batch.", "--runtime-mode-threshold", minimum=1)
    continuous_batching: bool = option(
        False, "Batch from the start: the same as --runtime-mode batched.", "--continuous-batching")
    max_num_seqs: int = option(
        256, "Most sequences computed together.", "--max-num-seqs", minimum=1, maximum=4096)
    max_batch_tokens: int = option(
        2048, "Most tokens a step computes, decode first.", "--max-batch-tokens", minimum=1)
    prefill_step_size: int = option(
        512, "Most prompt tokens of one sequence a step computes.", "--prefill-step-size", minimum=1)
    stall_target_ms: float = option(
        250.0, "Longest gap between two tokens of a running stream that prefill may cause, in milliseconds; prefill "
        "chunks are sized by it.", "--stall-target-ms", above=0)
    batch_invariant: bool = option(
        False, "Greedy output of a batch equals each request's own run token for token, at some cost in speed.",
        "--batch-invariant")


@dataclass(frozen=True, slots=True)
class SpeculationSettings:
    """Guessing tokens ahead and verifying several in one step; the text stays what it would have been."""

    speculation: str = option(
        "auto", "Guess tokens ahead where it pays: from prompt, answers, and a draft model or the model's own head "
        "(MTP); without the latter two; or not.",
        "--speculation", choices=("auto", "prompt-lookup", "off"))
    draft_model: str | None = option(
        None, "A smaller model with the same tokenizer that guesses for the served one: a folder or a hub id.",
        "--draft-model", metavar="MODEL")
    num_draft_tokens: int = option(
        16, "Most tokens guessed ahead for a sequence in a step.", "--num-draft-tokens", minimum=1, maximum=64)


@dataclass(frozen=True, slots=True)
class LimitSettings:
    """What a single request may take, and how many may wait."""

    max_tokens: int = option(
        32768, "Completion tokens where the request names no limit (never past the context).", "--max-tokens",
        minimum=1)
    max_request_tokens: int | None = option(
        None, "Most completion tokens a request may ask for; more is refused.", "--max-request-tokens", minimum=1)
    effective_context_tokens: int | None = option(
        None, "Context that is promised and enforced, when smaller than the model's own.",
        "--effective-context-tokens", minimum=1)
    timeout_s: float = option(
        300.0, "Seconds a request may take; its own `timeout` may only be shorter.", "--timeout", above=0,
        metavar="S", env="VLLM_MLX_TIMEOUT")
    max_queue: int = option(
        256, "Requests that may wait beyond those computed; more are answered 429 at once.", "--max-queue", minimum=0)


@dataclass(frozen=True, slots=True)
class GuardSettings:
    """Judges of memory, of batched answers, and of repetition."""

    memory_warn_threshold: float = option(
        70.0, "Percent of memory at which idle cache is dropped and a warning logged.", "--memory-warn-threshold",
        above=0, maximum=100)
    memory_limit_threshold: float = option(
        85.0, "Percent of memory at which --memory-action is taken.", "--memory-limit-threshold", above=0, maximum=100)
    memory_action: str = option(
        "warn", "At the limit: only warn, lower the context for new requests, or refuse new requests (503).",
        "--memory-action", choices=("warn", "reduce-context", "reject-new"))
    memory_monitor_interval: float = option(
        5.0, "Seconds between two readings of memory.", "--memory-monitor-interval", above=0, metavar="S")
    batch_divergence_monitor: bool = option(
        False, "Replay finished greedy requests alone when idle, and compare the tokens.",
        "--batch-divergence-monitor")
    batch_divergence_interval: float = option(
        300.0, "Seconds between two such replays.", "--batch-divergence-interval", above=0, metavar="S")
    batch_divergence_threshold: float = option(
        0.95, "Share of equal tokens below which a replay counts as divergence.", "--batch-divergence-threshold",
        above=0, maximum=1)
    batch_divergence_action: str = option(
        "warn", "On divergence: warn, or compute one sequence at a time until replays agree again.",
        "--batch-divergence-action", choices=("warn", "serialize"))
    repetition_policy: str = option(
        "safe", "End an answer that repeats itself: on clear loops, on suspicion, or never.", "--repetition-policy",
        choices=("safe", "strict", "off"))


@dataclass(frozen=True, slots=True)
class ParsingSettings:
    """How the model's text becomes reasoning, tool calls and content."""

    reasoning_parser: str = option(
        "auto", "Format by which reasoning is told from the answer: a name, `auto` (from the chat template), or "
        "`none`. It only separates; thinking itself is the request field `enable_thinking`.", "--reasoning-parser",
        metavar="NAME")
    max_thinking_tokens: int | None = option(
        None, "Most reasoning tokens; the engine then ends the reasoning and the answer follows. A request may ask "
        "for fewer.", "--max-thinking-tokens", minimum=1)
    enable_auto_tool_choice: bool = option(
        True, "Turn the model's tool calls into tool_calls when the request offers tools.",
        "--enable-auto-tool-choice", off_flag="--disable-auto-tool-choice")
    tool_call_parser: str = option(
        "auto", "Format of tool calls: a name, `auto` (from the chat template), or `none`.", "--tool-call-parser",
        metavar="NAME")


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """What is done to the prompts of agents so that each one extends the one before (docs/agents.md)."""

    strip_volatile: bool = option(
        True, "Leave out what some agents put into a prompt that differs in each request and tells the model nothing: "
        "the billing line before the system text, and turns that only count the tokens left.",
        "--strip-volatile-lines", off_flag="--keep-volatile-lines")
    system_turns: str = option(
        "in-place", "System turns inside a conversation: where they stand (as user turns where the template takes no "
        "others), always as user turns, or moved to the front, which costs the prefix cache.", "--system-turns",
        choices=("in-place", "as-user", "front"))
    keep_reasoning: str = option(
        "auto", "Reasoning of earlier turns that a client sends back: kept in the prompt when the request has tools "
        "(auto) or always, even if the chat template would drop it, or as the template has it.", "--keep-reasoning",
        choices=("auto", "always", "template"))
    sort_tools: bool = option(
        False, "Show the model a request's tools by name, for clients that send them in changing order.",
        "--sort-tools")
    background_model: tuple[str, ...] = option(
        ("*haiku*", "gpt-*-mini", "gpt-*-nano"), "Name (or pattern with *) by which agents ask for a small model in "
        "the background; such requests run behind the others. The served model's own names never count. May be "
        "repeated; an empty one is none.", "--background-model", metavar="NAME")


@dataclass(frozen=True, slots=True)
class MediaSettings:
    """Where images and videos may come from, and what is kept of them."""

    remote_media: bool = option(
        True, "Fetch http(s) URLs of images and videos (never from private addresses).", "--remote-media",
        off_flag="--no-remote-media")
    media_root: tuple[str, ...] = option(
        (), "Folder whose files requests may name by path. Without it any readable file may be named while the server "
        "listens on loopback only, and none otherwise. May be repeated.", "--media-root", metavar="DIR")
    encoder_cache_mb: int = option(
        512, "Encoded images kept for later questions about them, in MiB; 0 keeps none.", "--encoder-cache-mb",
        minimum=0)


@dataclass(frozen=True, slots=True)
class BesideSettings:
    """Models beside the served one, each for one kind of request; loaded at start."""

    embedding_model: str | None = option(
        None, "Model (folder or hub id) that answers /v1/embeddings.", "--embedding-model", metavar="MODEL")
    embedding_max_length: int | None = option(
        None, "Tokens of an input that are embedded; otherwise as many as the model was made for.",
        "--embedding-max-length", minimum=8, metavar="N")
    embedding_overflow_policy: str = option(
        "truncate", "What becomes of a longer input: its beginning is embedded, or the request is refused.",
        "--embedding-overflow-policy", choices=("truncate", "error"))
    rerank_model: str | None = option(
        None, "Model (cross-encoder or Qwen3-Reranker) that answers /v1/rerank and /v1/score.", "--rerank-model",
        metavar="MODEL")
    stt_model: str | None = option(
        None, "Speech-to-text model (Whisper and others of mlx-audio) for /v1/audio/transcriptions and translations.",
        "--stt-model", metavar="MODEL")
    tts_model: str | None = option(
        None, "Text-to-speech model (Kokoro and others of mlx-audio) for /v1/audio/speech.", "--tts-model",
        metavar="MODEL")
    max_audio_upload_mb: float = option(
        25.0, "Largest audio file that is transcribed, in MiB.", "--max-audio-upload-mb", above=0)
    max_tts_input_chars: int = option(
        4096, "Longest text that is spoken, in characters.", "--max-tts-input-chars", minimum=1)


@dataclass(frozen=True, slots=True)
class McpSettings:
    """Tools of MCP servers that this server connects to."""

    mcp_config: str | None = option(
        None, "File (JSON or YAML) that names MCP servers under `servers` or `mcpServers`.", "--mcp-config",
        metavar="FILE")
    mcp_in_chat: bool = option(
        False, "Offer these tools to the model in every chat that leaves the choice open, and call them here.",
        "--mcp-in-chat")
    mcp_max_steps: int = option(
        10, "Times one answer may stop to call tools here; then it is finished without.", "--mcp-max-steps",
        minimum=1, maximum=100)
    mcp_timeout: float = option(
        30.0, "Seconds a call of an MCP tool may take, where its server's entry names none.", "--mcp-timeout", above=0,
        metavar="S")


@dataclass(frozen=True, slots=True)
class CpuSettings:
    """What MLX's CPU backend computes slowly on Linux; no effect on macOS and on CUDA."""

    blas: str = option(
        "auto", "Library for float32 products: the system's OpenBLAS, the one inside the numpy wheel, the first of "
        "these that loads (`auto`), or MLX's own (`off`).", "--blas", choices=("auto", "system", "numpy", "off"))
    blas_threads: int | None = option(
        None, "Threads of that library; otherwise one fewer than there are cores.", "--blas-threads", minimum=1)
    few_row_kernels: bool = option(
        True, "All of our own CPU kernels: products of up to 64 rows, as in decoding, and row operations (softmax, "
        "exponentials, SwiGLU, RMS norms, rotary positions, argmax, and attention made of them). They need a C "
        "compiler once, at the first start.", "--few-row-kernels", off_flag="--no-few-row-kernels")


LOOPBACK_NAMES = ("localhost", "localhost.localdomain")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host in LOOPBACK_NAMES


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings. `given` names the fields (`group.field`) that a flag or the environment set; `notes` are sentences
    for the start-up log about flags whose names make no difference any more."""

    server: ServerSettings = ServerSettings()
    model: ModelSettings = ModelSettings()
    pool: PoolSettings = PoolSettings()
    sampling: SamplingSettings = SamplingSettings()
    cache: CacheSettings = CacheSettings()
    batch: BatchSettings = BatchSettings()
    speculation: SpeculationSettings = SpeculationSettings()
    limits: LimitSettings = LimitSettings()
    guards: GuardSettings = GuardSettings()
    parsing: ParsingSettings = ParsingSettings()
    agents: AgentSettings = AgentSettings()
    media: MediaSettings = MediaSettings()
    beside: BesideSettings = BesideSettings()
    mcp: McpSettings = McpSettings()
    cpu: CpuSettings = CpuSettings()
    given: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    @property
    def is_pool(self) -> bool:
        """Whether models come and go, rather than one staying from start to end."""
        pool = self.pool
        return bool(self.model.more_models or pool.models_config or pool.idle_unload_seconds)

    def resolve(self, facts: ModelFacts | None = None) -> tuple[Settings, tuple[str, ...]]:
        """Settings with every derived decision made, and the notes that explain them.

        Raises SettingsError, one sentence, for what contradicts itself or cannot be met. Before a model is loaded
        `facts` is None; what depends on the model is then left open. Resolving twice changes nothing more.
        """
        from vllm_mlx.resolution import resolve  # a cycle: it reads the fields that stand here

        return resolve(self, facts)

    def with_values(self, **values: Any) -> Settings:
        """A copy with other values; keys are `group__field`."""
        changes: dict[str, dict[str, Any]] = {}
        for key, value in values.items():
            group, _, name = key.partition("__")
            changes.setdefault(group, {})[name] = value
        return dataclasses.replace(
            self, **{group: dataclasses.replace(getattr(self, group), **fields) for group, fields in changes.items()})


@dataclass(frozen=True, slots=True)
class SettingField:
    """One field of one group, as `options.py` and the checks walk them."""

    group: str
    name: str
    default: Any
    option: Option

    @property
    def path(self) -> str:
        return f"{self.group}.{self.name}"

    @property
    def label(self) -> str:
        return self.option.flag or self.option.metavar or self.name


def setting_fields() -> Iterator[SettingField]:
    """Every setting in the order of the groups: the one list that flags, environment, help and docs come from."""
    for group in dataclasses.fields(Settings):
        if not dataclasses.is_dataclass(group.default):
            continue
        for item in dataclasses.fields(group.default):
            yield SettingField(group.name, item.name, item.default, item.metadata["option"])
