"""Kimi-VL Thinking: read like `kimi`; a thinking budget ends it with its own marker."""

from __future__ import annotations

from dataclasses import replace

from vllm_mlx.parsers.reasoning import kimi

FORMAT = replace(kimi.FORMAT, name="kimi_vl", aliases=(), pairs=kimi.FORMAT.pairs[::-1])
