"""Errors that name a field of the request: made, and renamed as the protocol at hand writes its fields.

The layers below speak of OpenAI's chat fields.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from vllm_mlx.errors import InvalidRequest


def invalid(param: str, message: str) -> InvalidRequest:
    return InvalidRequest(message, param=param, code="invalid_value")


def refuse(param: str, message: str) -> InvalidRequest:
    """A value that is well formed but not served here."""
    return InvalidRequest(message, param=param, code="unsupported_value")


def missing(param: str) -> InvalidRequest:
    return InvalidRequest(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")


@contextmanager
def renamed_params(rename: Callable[[str], str]) -> Iterator[None]:
    """Errors raised inside name their field as `rename` would have it."""
    try:
        yield
    except InvalidRequest as error:
        if error.param is not None:
            error.param = rename(error.param)
        raise


def rename_by(table: Mapping[str, str]) -> Callable[[str], str]:
    """A renaming by pairs of pattern and replacement; the first pattern that matches a whole name counts."""
    rules = [(re.compile(pattern), replacement) for pattern, replacement in table.items()]

    def rename(param: str) -> str:
        for pattern, replacement in rules:
            if pattern.fullmatch(param):
                return pattern.sub(replacement, param)
        return param

    return rename
