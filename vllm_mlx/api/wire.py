"""The base of all wire types: strict, tolerant of unknown fields, used at the edge only."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class WireModel(BaseModel):
    """Strict: a string is not a number. `extra="ignore"`: protocols grow, and clients are ahead of us."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=(), allow_inf_nan=False)
