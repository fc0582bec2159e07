"""How each client is told where the server is: settings files, environment, command. One function a client.

What is set beside address, key and model has a reason: small-model names go to the same model, and what a client puts
into its prompts that only its maker's servers understand is switched off where that can be.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_mlx.connect.files import Change
from vllm_mlx.connect.server import Server

NAME = "vllm-mlx"
KEY_VARIABLE = "VLLM_MLX_API_KEY"


@dataclass(frozen=True, slots=True)
class Plan:
    """What connects one client. `command` starts it with `environment`; empty where it cannot be started so.

    `notes` are sentences for a person.
    """

    title: str
    changes: tuple[Change, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def home() -> Path:
    return Path.home()


def config_home() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or home() / ".config")


def claude_code(server: Server) -> Plan:
    model = server.model
    environment = {
        "ANTHROPIC_BASE_URL": server.url,
        "ANTHROPIC_AUTH_TOKEN": server.any_key,
        "ANTHROPIC_MODEL": model,
        "ANTHROPIC_DEFAULT_OPUS_MODEL": model,
        "ANTHROPIC_DEFAULT_SONNET_MODEL": model,
        # A name that is known as a small model's: its requests run behind the others (--background-model).
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": "claude-haiku" if server.takes_any_name else model,
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(server.max_output_tokens),
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
        "CLAUDE_CODE_TOTAL_TOKENS_REMINDER": "off",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    folder = Path(os.environ.get("CLAUDE_CONFIG_DIR") or home() / ".claude")
    change = Change(folder / "settings.json", "json", {"env": environment})
    return Plan("Claude Code", (change,), environment, ("claude",))


def codex(server: Server) -> Plan:
    provider: dict[str, Any] = {"name": NAME, "base_url": server.openai_url, "wire_api": "responses"}
    if server.key:
        provider["env_key"] = KEY_VARIABLE
    inline = ", ".join(f"{key} = {json.dumps(value)}" for key, value in provider.items())
    # Command-line overrides; the file holds the provider only, so that other models stay as they were.
    options = ("-c", f"model_providers.{NAME}={{{inline}}}", "-c", f'model_provider="{NAME}"', "-m", server.model,
               "-c", f"model_context_window={server.context_tokens}")  # fmt: skip
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in provider.items())
    folder = Path(os.environ.get("CODEX_HOME") or home() / ".codex")
    change = Change(folder / "config.toml", "toml", f"[model_providers.{NAME}]\n{lines}")
    environment = {KEY_VARIABLE: server.key} if server.key else {}
    notes = (f"then: codex -c model_provider={NAME} -m {server.model}",)
    return Plan("Codex", (change,), environment, ("codex", *options), notes)


def opencode(server: Server) -> Plan:
    limits = {"context": server.context_tokens, "output": server.max_output_tokens}
    inputs = ["text", "image"] if server.takes_images else ["text"]
    model = {"name": server.model, "tool_call": True, "limit": limits,
             "modalities": {"input": inputs, "output": ["text"]}}  # fmt: skip
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": NAME,
        "options": {"baseURL": server.openai_url, "apiKey": server.any_key},
        "models": {server.model: model},
    }
    content = {
        "$schema": "https://opencode.ai/config.json",
        "provider": {NAME: provider},
        "model": f"{NAME}/{server.model}",
    }
    change = Change(config_home() / "opencode" / "opencode.json", "json", content)
    return Plan("OpenCode", (change,), {"OPENCODE_CONFIG_CONTENT": json.dumps(content)}, ("opencode",))


def qwen_code(server: Server) -> Plan:
    entry = {"id": server.model, "name": server.model, "baseUrl": server.openai_url, "envKey": KEY_VARIABLE,
             "generationConfig": {"contextWindowSize": server.context_tokens}}  # fmt: skip
    content = {
        "modelProviders": {"openai": [entry]},
        "env": {KEY_VARIABLE: server.any_key},
        "security": {"auth": {"selectedType": "openai"}},
        "model": {"name": server.model},
    }
    environment = {
        "OPENAI_BASE_URL": server.openai_url, "OPENAI_API_KEY": server.any_key, "OPENAI_MODEL": server.model,
        KEY_VARIABLE: server.any_key,
    }  # fmt: skip
    change = Change(home() / ".qwen" / "settings.json", "json", content)
    return Plan("Qwen Code", (change,), environment, ("qwen", "--auth-type", "openai", "-m", server.model))


def open_webui(server: Server) -> Plan:
    environment = {"OPENAI_API_BASE_URL": server.openai_url, "OPENAI_API_KEY": server.any_key,
                   "ENABLE_OLLAMA_API": "False"}  # fmt: skip
    notes = (
        f"the model appears as {server.model}",
        "a running Open WebUI: Settings, Admin Settings, Connections, OpenAI API, with the address and key above",
        "in a container the server is at host.docker.internal instead of 127.0.0.1, and must listen with "
        "--host 0.0.0.0 and a key",
    )
    return Plan("Open WebUI", (), environment, ("open-webui", "serve", "--port", "8080"), notes)


def continue_dev(server: Server) -> Plan:
    model = {
        "name": NAME,
        "provider": "openai",
        "model": server.model,
        "apiBase": server.openai_url,
        "apiKey": server.any_key,
        "roles": ["chat", "edit", "apply"],
        "capabilities": ["tool_use", *(["image_input"] if server.takes_images else [])],
        "defaultCompletionOptions": {
            "contextLength": server.context_tokens, "maxTokens": server.max_output_tokens,
        },
    }  # fmt: skip
    content = {"name": "Local", "version": "1.0.0", "schema": "v1", "models": [model]}
    path = home() / ".continue" / "config.yaml"
    if path.exists():
        content = {"models": [model]}
    notes = ("comments in that file are not kept (the backup has them)",)
    return Plan("Continue", (Change(path, "yaml", content),), notes=notes)


def zed(server: Server) -> Plan:
    model = {
        "name": server.model,
        "display_name": server.model,
        "max_tokens": server.context_tokens,
        "max_output_tokens": server.max_output_tokens,
        "capabilities": {
            "tools": True, "images": server.takes_images, "parallel_tool_calls": True, "prompt_cache_key": False,
        },
    }  # fmt: skip
    provider = {"api_url": server.openai_url, "available_models": [model]}
    content = {"language_models": {"openai_compatible": {NAME: provider}}}
    notes = (
        f"Zed keeps the key itself: agent settings, LLM providers, {NAME}; or start it with {KEY_VARIABLE} set",
        "Zed's settings may hold comments; then the file is not written, and this is what to add",
    )
    change = Change(config_home() / "zed" / "settings.json", "json", content)
    return Plan("Zed", (change,), {KEY_VARIABLE: server.any_key}, ("zed", "--foreground"), notes)


def goose(server: Server) -> Plan:
    settings = {"GOOSE_PROVIDER": "openai", "GOOSE_MODEL": server.model, "OPENAI_HOST": server.url,
                "OPENAI_BASE_PATH": "v1/chat/completions"}  # fmt: skip
    environment = {**settings, "OPENAI_API_KEY": server.any_key, "GOOSE_CONTEXT_LIMIT": str(server.context_tokens)}
    change = Change(config_home() / "goose" / "config.yaml", "yaml", settings)
    notes = (
        f"goose takes the key from its keyring or the environment: OPENAI_API_KEY={server.any_key}",
        "comments in that file are not kept (the backup has them)",
    )
    return Plan("Goose", (change,), environment, ("goose", "session"), notes)


def aider(server: Server) -> Plan:
    model = f"openai/{server.model}"
    content = {"model": model, "weak-model": model, "openai-api-base": server.openai_url,
               "openai-api-key": server.any_key}  # fmt: skip
    facts = {model: {"max_input_tokens": server.context_tokens, "max_output_tokens": server.max_output_tokens,
                     "input_cost_per_token": 0, "output_cost_per_token": 0, "litellm_provider": "openai",
                     "mode": "chat"}}  # fmt: skip
    changes = (
        Change(home() / ".aider.conf.yml", "yaml", content),
        Change(home() / ".aider.model.metadata.json", "json", facts),
    )
    environment = {"OPENAI_API_BASE": server.openai_url, "OPENAI_API_KEY": server.any_key}
    notes = ("comments in .aider.conf.yml are not kept (the backup has them)",)
    return Plan("aider", changes, environment, ("aider", "--model", model, "--weak-model", model), notes)


def openai_app(server: Server) -> Plan:
    """SemaChat, Jan, Chatbox, Cherry Studio and whatever else asks for an OpenAI-compatible address."""
    environment = {"OPENAI_BASE_URL": server.openai_url, "OPENAI_API_KEY": server.any_key}
    notes = (
        f"address (base URL)  {server.openai_url}",
        f"API key             {server.any_key}",
        f"model               {server.model}",
        f"context             {server.context_tokens} tokens",
    )
    return Plan("An app that speaks OpenAI", (), environment, (), notes)


CLIENTS: dict[str, Callable[[Server], Plan]] = {
    "claude-code": claude_code,
    "codex": codex,
    "opencode": opencode,
    "qwen-code": qwen_code,
    "open-webui": open_webui,
    "continue": continue_dev,
    "zed": zed,
    "goose": goose,
    "aider": aider,
    "openai-app": openai_app,
}
ALIASES = {"claude": "claude-code", "qwen": "qwen-code", "webui": "open-webui", "semachat": "openai-app",
           "jan": "openai-app", "chatbox": "openai-app", "cherry-studio": "openai-app"}  # fmt: skip
