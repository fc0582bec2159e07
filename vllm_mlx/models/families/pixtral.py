"""Pixtral writes pictures as Mistral 3 does."""

from .mistral3 import ModelFamily as ModelFamily
