"""What all wire types are made of: a strict base that tolerates unknown fields, and the forms that a union may take.

Union branches are tagged in angle brackets, which `errors.invalid_from` removes from the path it shows.
Used at the edge only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

from vllm_mlx.engine.request import BACKGROUND, INTERACTIVE

PRIORITIES = {"interactive": INTERACTIVE, "background": BACKGROUND}


class WireModel(BaseModel):
    """Strict: a string is not a number. `extra="ignore"`: protocols grow, and clients are ahead of us."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=(), allow_inf_nan=False)


def text_or_list(value: Any) -> str:
    return "<list>" if isinstance(value, list) else "<text>"


def type_of(value: Any) -> Any:
    """What an object, parsed or not, calls itself."""
    return value.get("type") if isinstance(value, dict) else getattr(value, "type", None)


def kind_of(kinds: Mapping[str, str], default: str | None = None) -> Callable[[Any], str | None]:
    """A discriminator: the tag of a value's `type`; `default` for a type that is not among `kinds`."""

    def kind(value: Any) -> str | None:
        found = type_of(value)
        return kinds.get(found, default) if isinstance(found, str) else default

    return kind


def tool_choice_form(value: Any) -> str:
    kind = type_of(value)
    if kind is None:
        return "<mode>"
    return "<allowed tools>" if kind == "allowed_tools" else "<named tool>"


def _number_of(value: Any) -> Any:
    return PRIORITIES.get(value, value) if isinstance(value, str) else value


Priority = Annotated[int, BeforeValidator(_number_of)]
"""As in vLLM a number, lower first; or `interactive` or `background`."""
