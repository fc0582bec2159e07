"""PaliGemma: prefix tokens, pictures and words alike, see each other in both directions."""

from __future__ import annotations

from typing import Any

from ..whole_family import INSTRUCTIONS, WholeFamily, WholePrompt


class ModelFamily(WholeFamily):
    reason = "it reads its whole prompt in both directions"
    max_images = 1
    template = INSTRUCTIONS
    keeps_own_cache = False

    @classmethod
    def applies(cls, model: Any) -> bool:
        return bool(getattr(model.config.text_config, "use_bidirectional_attention", True))

    def read_text(self, text: str) -> WholePrompt:
        bos = getattr(self.tokenizer, "bos_token", None) or ""
        return WholePrompt(tuple(self.tokenizer.encode(f"{bos}{text}\n", add_special_tokens=False)))
