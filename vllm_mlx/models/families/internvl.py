"""InternVL in transformers' own format: prompts and tiles as in the original."""

from .internvl_chat import ModelFamily as ModelFamily
