"""What may be wrong with a model that loads: its number format, its end tokens, its chat template. Pure; no MLX.

Entries of `/health/diagnostics`, made once when the model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from vllm_mlx.models.profile import ModelProfile

# Their activations leave float16's range: infinities, then empty or looping answers.
NEEDS_RANGE = ("gemma3", "gemma2", "qwen3_vl_moe")


class Renders(Protocol):
    """The part of a tokenizer that the template check needs."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...

    def decode(self, ids: Any, **options: Any) -> str: ...


@dataclass(frozen=True, slots=True)
class Finding:
    """`status` is pass, warning or fail; `detail` a sentence, `metadata` its evidence."""

    status: str
    detail: str
    metadata: Mapping[str, Any]

    def shown(self) -> dict[str, Any]:
        return {"status": self.status, "detail": self.detail, "metadata": dict(self.metadata)}


def check_model(stored: ModelProfile, loaded: ModelProfile, tokenizer: Renders) -> dict[str, dict[str, Any]]:
    """All findings, by name. `stored` is the profile of the files, `loaded` that of the arrays in memory."""
    findings = {
        "dtype": check_dtype(stored, loaded),
        "eos": check_eos(loaded, tokenizer),
        "chat_template": check_template(loaded, tokenizer),
    }
    return {name: finding.shown() for name, finding in findings.items()}


def check_dtype(stored: ModelProfile, loaded: ModelProfile) -> Finding:
    """Whether the weights are computed in a format that can hold what the model makes of them."""
    packed = f", {stored.quantization.get('bits')}-bit" if stored.quantization else ""
    metadata = {
        "loaded": loaded.dtype,
        "stored": stored.dtype,
        "stored_quantization": dict(stored.quantization) if stored.quantization else None,
        "is_quantized": loaded.quantization is not None,
    }
    detail = f"computed in {loaded.dtype}, stored as {stored.dtype}{packed}"
    if loaded.dtype == "float16":
        if loaded.model_type.startswith(NEEDS_RANGE):
            return Finding("warning", f"{detail}: {loaded.model_type} leaves float16's range; use bfloat16", metadata)
        if stored.dtype == "bfloat16":
            return Finding("warning", f"{detail}: float16 has less range than the model was trained in", metadata)
    return Finding("pass", detail, metadata)


def check_eos(profile: ModelProfile, tokenizer: Renders) -> Finding:
    """Whether an answer can end, and by which tokens."""
    tokens = {str(i): tokenizer.decode([i], skip_special_tokens=False) for i in profile.eos_token_ids}
    metadata = {"eos_token_ids": list(profile.eos_token_ids), "tokens": tokens}
    if not profile.eos_token_ids:
        return Finding("fail", "no end token is known: every answer runs to its token limit", metadata)
    beyond = [i for i in profile.eos_token_ids if not 0 <= i < profile.vocab_size]
    if beyond:
        return Finding("warning", f"the model cannot say its end tokens {beyond}: its vocabulary ends before", metadata)
    return Finding("pass", f"answers end at {', '.join(tokens.values())}", metadata)


def check_template(profile: ModelProfile, tokenizer: Renders) -> Finding:
    """Whether a chat can be written in the model's own form."""
    if profile.chat_template is None:
        return Finding("warning", "the model has no chat template: only /v1/completions can be served", {})
    try:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # templates are programs of strangers
        return Finding("warning", f"the chat template fails on a plain message: {error}", {"error": str(error)})
    metadata = {"prompt": str(prompt)[:500]}
    if "hello" not in str(prompt):
        return Finding("warning", "the chat template loses the user's message", metadata)
    return Finding("pass", "a plain message renders", metadata)
