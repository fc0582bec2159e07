"""The base of all wire types: strict, tolerant of unknown fields, used at the edge only."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

from vllm_mlx.engine.request import BACKGROUND, INTERACTIVE

PRIORITIES = {"interactive": INTERACTIVE, "background": BACKGROUND}


class WireModel(BaseModel):
    """Strict: a string is not a number. `extra="ignore"`: protocols grow, and clients are ahead of us."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=(), allow_inf_nan=False)


def _number_of(value: Any) -> Any:
    return PRIORITIES.get(value, value) if isinstance(value, str) else value


Priority = Annotated[int, BeforeValidator(_number_of)]
"""As in vLLM a number, lower first; or `interactive` or `background`."""
