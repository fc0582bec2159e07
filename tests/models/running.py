"""Drives a model adapter as the engine does, one row at a time: odd prefill chunks, the last token through decode."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from vllm_mlx.engine.request import MediaSpan, Prompt

ODD_CHUNKS = (7, 1, 19, 5, 64, 33)


def greedy(
    model: Any,
    token_ids: Sequence[int],
    num_tokens: int,
    *,
    media: Sequence[MediaSpan] = (),
    chunks: Sequence[int] = ODD_CHUNKS,
) -> list[int]:
    prompt = Prompt(tuple(token_ids), tuple(media))
    state = model.prompt_state(prompt)
    features = {i: model.encode(span) for i, span in enumerate(prompt.media)}
    cache = model.make_cache()
    at = prefill(model, prompt, 0, len(prompt) - 1, cache, state, features, chunks)
    token = prompt.token_ids[-1]
    out: list[int] = []
    for position in range(at, at + num_tokens):
        logits = model.decode(mx.array([[token]]), [position], cache, [state])
        token = int(mx.argmax(logits, axis=-1).item())
        out.append(token)
    return out


def prefill(
    model: Any,
    prompt: Prompt,
    start: int,
    end: int,
    cache: list[Any],
    state: Any,
    features: dict[int, Any],
    chunks: Sequence[int],
) -> int:
    """Prompt tokens [start, end) in chunks of about the given sizes, over and over; returns `end`."""
    sizes = itertools.cycle(chunks)
    at = start
    while at < end:
        n = min(next(sizes), end - at)
        if model.atomic_spans:
            n = max([n, *(s.end - at for s in prompt.media if at <= s.start < at + n)])
        met = {i: features[i] for i, s in enumerate(prompt.media) if s.start < at + n and at < s.end}
        model.prefill(mx.array([prompt.token_ids[at : at + n]]), at, cache, state, met)
        mx.eval([c.state for c in cache])
        at += n
    return at
