"""Texts and pairs of texts as rows of tokens, cut to what a model takes. Runs on a worker thread; knows no MLX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from vllm_mlx.errors import InvalidRequest
from vllm_mlx.models.token_row import TokenRow

# The frame that Qwen3-Reranker was trained with, from its model card.
_JUDGE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
_VERDICT = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
MOST_SPECIAL_TOKENS = 4
"""A tokenizer cannot cut a text to fewer tokens than it puts around it."""
DEFAULT_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


class Tokenized(Protocol):
    """What is asked of a model here; `models.encoder.EncoderModel` fits."""

    @property
    def tokenizer(self) -> Any:
        """A transformers fast tokenizer."""
        ...

    @property
    def profile(self) -> Any: ...


def text_rows(
    model: Tokenized, inputs: Sequence[str | Sequence[int]], limit: int, *, refuses_longer: bool = False
) -> tuple[list[TokenRow], int]:
    """A row for each text or row of token ids, and how many were cut to `limit` tokens."""
    rows, num_truncated = [], 0
    for i, item in enumerate(inputs):
        token_ids = model.tokenizer.encode(item) if isinstance(item, str) else _checked(model, item, i)
        if len(token_ids) > limit:
            if refuses_longer:
                raise InvalidRequest(
                    f"Input {i} has {len(token_ids)} tokens, but this model takes {limit}; shorten it, or send "
                    "'truncate_prompt_tokens': -1 to embed its beginning.",
                    param=f"input.{i}",
                    code="context_length_exceeded",
                )
            num_truncated += 1
            if isinstance(item, str) and limit > MOST_SPECIAL_TOKENS:
                token_ids = model.tokenizer.encode(item, truncation=True, max_length=limit)
            else:
                token_ids = token_ids[:limit]
        if not token_ids:
            raise InvalidRequest(f"Input {i} holds nothing to embed.", param=f"input.{i}", code="invalid_value")
        rows.append(TokenRow(tuple(token_ids)))
    return rows, num_truncated


def _checked(model: Tokenized, token_ids: Sequence[int], index: int) -> Sequence[int]:
    size = model.profile.vocab_size
    for token_id in token_ids:
        if not 0 <= token_id < size:
            raise InvalidRequest(
                f"Token id {token_id} is outside this model's vocabulary of {size}; its token ids are not those "
                "of OpenAI's models, so send text unless you have its tokenizer.",
                param=f"input.{index}",
                code="invalid_value",
            )
    return token_ids


def pair_rows(model: Tokenized, pairs: Sequence[tuple[str, str]], limit: int) -> list[TokenRow]:
    """A row for each pair of query and document, the longer of the two cut where they pass `limit` together."""
    encoded = model.tokenizer(
        [query for query, _ in pairs],
        [document for _, document in pairs],
        truncation=True,
        max_length=limit,
    )
    types = encoded.get("token_type_ids") or [None] * len(pairs)
    return [
        TokenRow(tuple(ids), None if kinds is None else tuple(kinds))
        for ids, kinds in zip(encoded["input_ids"], types, strict=True)
    ]


def judged_rows(
    model: Tokenized, pairs: Sequence[tuple[str, str]], limit: int, instruction: str = DEFAULT_INSTRUCTION
) -> list[TokenRow]:
    """Qwen3-Reranker's prompts: the frame's tokens around the texts', in which nothing is read as a control token."""

    def plain(text: str) -> list[int]:
        encoded: list[int] = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return encoded

    tokenizer = model.tokenizer
    before = tokenizer.encode(_JUDGE, add_special_tokens=False)
    after = tokenizer.encode(_VERDICT, add_special_tokens=False)
    room = limit - len(before) - len(after)
    if room < 16:
        raise InvalidRequest("This model's context is too short for its own prompt.", param="model")
    return [
        TokenRow(
            (
                *before,
                *plain(f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}")[:room],
                *after,
            )
        )
        for query, document in pairs
    ]


def cut_text(model: Tokenized, document: str, max_tokens: int | None) -> str:
    if max_tokens is None:
        return document
    encoded = model.tokenizer(document, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    return document if len(offsets) <= max_tokens else document[: offsets[max_tokens - 1][1]]
