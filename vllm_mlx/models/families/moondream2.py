"""Moondream 2 in its later form, which shares Moondream 3's tokenizer, processor and questions."""

from .moondream3 import ModelFamily as ModelFamily
