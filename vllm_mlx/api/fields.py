"""Request fields that are the same in every protocol that generates, and what they mean: both written once.

A protocol's request type inherits them. What protocols name or bound differently (the token limit, stop strings, tools)
stays in their own modules. Used at the edge only.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from vllm_mlx.api.params import invalid
from vllm_mlx.api.wire import Priority, WireModel
from vllm_mlx.generation.request import SamplingOverrides

MaxTokens = Annotated[int, Field(ge=1, le=2**31 - 1)]
NumThinkingTokens = Annotated[int, Field(ge=0)]


class ThinkingFields(WireModel):
    """Part of what decides a prompt, so counting its tokens takes them too. This server's extensions."""

    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class GenerationFields(WireModel):
    """How tokens are chosen, and how the request is treated beside others."""

    stream: bool | None = False
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    timeout: Annotated[float, Field(gt=0)] | None = None
    priority: Priority | None = None
    adapter: str | None = None
    include_diagnostics: bool | None = None
    diagnostics_level: Literal["basic", "deep"] | None = None
    repetition_policy_override: Literal["safe", "strict", "off"] | None = None


def sampling_overrides(body: GenerationFields, *, seed_offset: int = 0) -> SamplingOverrides:
    """`seed_offset` is the index of a choice: choices of one seeded request differ, and repeat from run to run."""
    return SamplingOverrides(
        temperature=body.temperature,
        # 0 keeps the most likely token only, which is what the smallest positive value does.
        top_p=max(body.top_p, 1e-6) if body.top_p is not None else None,
        top_k=max(body.top_k, 0) if body.top_k is not None else None,
        min_p=body.min_p,
        seed=(body.seed + seed_offset) % 2**63 if body.seed is not None else None,
        repetition_penalty=body.repetition_penalty,
    )


def treatment(body: GenerationFields) -> dict[str, Any]:
    """The arguments of `GenerationRequest` that say how it is treated beside others."""
    return {
        "timeout_s": body.timeout,
        "priority": body.priority or 0,
        "repetition_policy": body.repetition_policy_override,
    }


def shown_diagnostics(body: GenerationFields) -> str | None:
    """The level of diagnostics in the answer, None for none. Naming a level asks for them."""
    return body.diagnostics_level or ("basic" if body.include_diagnostics else None)


def asks_to_think(body: ThinkingFields) -> bool | None:
    """The explicit field wins over the template argument; None where neither says anything."""
    in_template = (body.chat_template_kwargs or {}).get("enable_thinking")
    if in_template is not None and not isinstance(in_template, bool):
        raise invalid("chat_template_kwargs.enable_thinking", "'enable_thinking' must be true or false.")
    return body.enable_thinking if body.enable_thinking is not None else in_template
