"""Qwen3-VL with experts: nothing that the engine sees differs."""

from .qwen3_vl import ModelFamily as ModelFamily
