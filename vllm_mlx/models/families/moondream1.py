"""The model type that published Moondream 2 checkpoints name."""

from .moondream2 import ModelFamily as ModelFamily
