"""Qwen2.5-VL prompts and positions are Qwen2-VL's; its tower differs, inside mlx-vlm."""

from .qwen2_vl import ModelFamily as ModelFamily
