"""SmolVLM writes its prompts as Idefics3 does."""

from .idefics3 import ModelFamily as ModelFamily
