"""What tells that a model uses a format: texts in its chat template, or tokens of its vocabulary."""

from __future__ import annotations

from collections.abc import Collection


class Sign:
    """All `texts` are in the template and all `tokens` among the special tokens. Template texts weigh more."""

    def __init__(self, *texts: str, tokens: tuple[str, ...] = ()) -> None:
        self._texts = texts
        self._tokens = tokens

    def is_in(self, template: str, tokens: Collection[str]) -> bool:
        return all(t in template for t in self._texts) and all(t in tokens for t in self._tokens)

    @property
    def weight(self) -> int:
        return 100 * sum(map(len, self._texts)) + sum(map(len, self._tokens))
