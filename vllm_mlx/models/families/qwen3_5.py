"""Qwen3.5 and 3.6: Qwen3-VL's prompts and positions over a hybrid language model, without deepstack."""

from __future__ import annotations

from .qwen3_vl import ModelFamily as Qwen3VLFamily


class ModelFamily(Qwen3VLFamily):
    has_deepstack = False
