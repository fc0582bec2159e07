"""How to sample, under vLLM's names. What is None is left to the model's defaults, as in a request to the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """One set for all prompts of a batch, or one for each.

    Unlike vLLM's, `temperature` and `max_tokens` have no fixed default: the temperature of the model's makers is used,
    and the answer may be as long as the context allows. `logprobs` gives as many alternatives a token (0: the token's
    own), and is also what fills `CompletionOutput.token_ids`.
    """

    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    structured_outputs: Mapping[str, Any] | None = None
    """As in vLLM: one of `json` (a schema), `regex`, `choice`, `grammar`, `json_object`."""

    def request_fields(self) -> dict[str, Any]:
        """The fields of an OpenAI request that mean the same; only those that were set."""
        given: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if value is None or item.name in ("n", "logprobs"):
                continue
            if item.name == "logit_bias":
                value = {str(token_id): bias for token_id, bias in value.items()}
            elif item.name in ("stop", "stop_token_ids") and not isinstance(value, str):
                value = list(value)
            elif item.name == "structured_outputs":
                value = dict(value)
            given[item.name] = value
        return given
