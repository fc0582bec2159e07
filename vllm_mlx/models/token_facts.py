"""What a folder says of its tokens: which end a sequence or begin one, which are special, and the chat template.

Reads JSON only, no tokenizer library; any thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .json_file import read_json

# Tokens that end an assistant's turn in a chat template and nothing else; some conversions forget to list them as EOS.
TURN_ENDS = ("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<turn|>")


def _as_ids(value: object) -> tuple[int, ...]:
    if isinstance(value, bool):
        return ()
    if isinstance(value, int):
        return (value,)
    if isinstance(value, list):
        return tuple(v for v in value if isinstance(v, int) and not isinstance(v, bool))
    return ()


def _token_text(value: object) -> str | None:
    """tokenizer_config writes a token as its text or as an object."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def eos_token_ids(
    configs: tuple[Mapping[str, Any], ...], tokenizer_config: Mapping[str, Any], token_ids: Mapping[str, int]
) -> tuple[int, ...]:
    ids: dict[int, None] = {}
    for config in configs:
        ids.update(dict.fromkeys(_as_ids(config.get("eos_token_id"))))
    text = _token_text(tokenizer_config.get("eos_token"))
    if text is not None and text in token_ids:
        ids[token_ids[text]] = None
    return tuple(ids)


def bos_token_id(
    configs: tuple[Mapping[str, Any], ...], tokenizer_config: Mapping[str, Any], token_ids: Mapping[str, int]
) -> int | None:
    text = _token_text(tokenizer_config.get("bos_token"))
    if text is not None and text in token_ids:
        return token_ids[text]
    for config in configs:
        for token_id in _as_ids(config.get("bos_token_id")):
            return token_id
    return None


def named_tokens(path: Path, tokenizer_config: Mapping[str, Any]) -> tuple[dict[str, int], tuple[str, ...]]:
    """Added tokens by text, and which of them are special."""
    ids: dict[str, int] = {}
    special: dict[str, None] = {}

    def add(text: str | None, token_id: object, is_special: bool) -> None:
        if text and isinstance(token_id, int):
            ids[text] = token_id
            if is_special:
                special[text] = None

    for key, value in (tokenizer_config.get("added_tokens_decoder") or {}).items():
        if isinstance(value, dict) and str(key).isdigit():
            add(_token_text(value), int(key), bool(value.get("special")))
    tokenizer = read_json(path / "tokenizer.json", required=False)
    for entry in tokenizer.get("added_tokens") or ():
        if isinstance(entry, dict):
            add(_token_text(entry), entry.get("id"), bool(entry.get("special")))
    vocab = (tokenizer.get("model") or {}).get("vocab")
    if isinstance(vocab, dict):
        for key in ("eos_token", "bos_token"):
            text = _token_text(tokenizer_config.get(key))
            if text and text not in ids and isinstance(vocab.get(text), int):
                add(text, vocab[text], True)
    return ids, tuple(special)


def chat_template(path: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    value = read_json(path / "chat_template.json", required=False).get("chat_template")
    if value is None:
        value = tokenizer_config.get("chat_template")
    if isinstance(value, list):
        named = {v.get("name"): v.get("template") for v in value if isinstance(v, dict)}
        value = named.get("default") or next(iter(named.values()), None)
    return value if isinstance(value, str) and value.strip() else None
