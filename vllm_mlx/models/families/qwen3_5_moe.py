"""Qwen3.5 with experts: nothing that the engine sees differs."""

from .qwen3_5 import ModelFamily as ModelFamily
