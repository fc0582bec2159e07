"""LLaVA-OneVision: packed tiles as in LLaVA-NeXT, sized down when there are many; mlx-vlm does both rightly."""

from __future__ import annotations

from ..generic import GenericFamily


class ModelFamily(GenericFamily):
    runs_batched = True
