"""Models that read a text once and give numbers: embedding models and rerankers. MLX thread only.

The networks are mlx-vlm's encoders (BERT, XLM-RoBERTa, ModernBERT, Qwen3-Embedding and others) and, for Qwen3-Reranker,
mlx-lm's Qwen3; pooling follows the sentence-transformers files in the folder. Rows of a batch are padded on the right
and masked, so company changes no result. What turns text into rows is `generation`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
from mlx_vlm.embedding_loader import load_embedding_model
from mlx_vlm.models.pooling import read_pooling_config
from mlx_vlm.reranker import RerankerKind, reranker_kind
from mlx_vlm.reranker_loader import load_sequence_classification_model

from ..errors import ModelLoadError
from .json_file import read_json
from .memory import available_memory_bytes
from .profile import ModelProfile, read_profile
from .stack import load_tokenizer, loading, refuse_remote_code, require_tokenizer, with_precision
from .token_row import TokenRow
from .weights import apply_precision, choose_precision

_PROBE_LENGTH = 4


@dataclass(frozen=True)
class EncoderModel:
    """A loaded model and what its users need to know.

    `compute` takes rows and gives float32: (rows, dimensions) unit vectors of an embedding model, (rows,) raw scores of
    a reranker. `kind` is "embedding", "cross-encoder" or "generative" (Qwen3-Reranker); `max_tokens` the longest row;
    `has_sigmoid` whether a reranker's makers put a sigmoid behind its raw score.
    """

    kind: str
    profile: ModelProfile
    tokenizer: Any
    max_tokens: int
    dimensions: int
    compute: Callable[[Sequence[TokenRow]], np.ndarray]
    has_sigmoid: bool = True

    @property
    def nbytes(self) -> int:
        return self.profile.weights_bytes


def load_embedder(path: Path | str, *, dtype: str = "auto", trust_remote_code: bool = False) -> EncoderModel:
    """The embedding model in folder `path`."""
    profile = read_profile(path)
    network, profile = _load(profile, lambda: load_embedding_model(profile.path, lazy=True), dtype, trust_remote_code)
    if (pooling := read_pooling_config(profile.path)) is not None:
        network.pooling_config = pooling  # the seam of mlx-vlm's encoders
    pad_id = _pad_id(profile)
    model = EncoderModel(
        kind="embedding",
        profile=profile,
        tokenizer=load_tokenizer(profile, trust_remote_code=trust_remote_code),
        max_tokens=_max_tokens(profile),
        dimensions=0,
        compute=lambda rows: _numpy(_run(network, pad_id, rows).text_embeds),
    )
    with loading(profile):
        probe = model.compute([TokenRow((0,) * _PROBE_LENGTH)])
    if probe.ndim != 2:
        raise ModelLoadError(f"{profile.name} gives a vector for each token, not one for a text; serve another model.")
    return replace(model, dimensions=probe.shape[1])


def load_reranker(path: Path | str, *, dtype: str = "auto", trust_remote_code: bool = False) -> EncoderModel:
    """The cross-encoder or Qwen3-Reranker in folder `path`."""
    profile = read_profile(path)
    config = read_json(profile.path / "config.json")
    with loading(profile):
        kind = reranker_kind(config)
    if kind is RerankerKind.GENERATIVE_VL:
        raise ModelLoadError(f"{profile.name} ranks pictures, which is not served; give a text reranker.")
    if kind is RerankerKind.GENERATIVE_TEXT:
        return _load_generative(profile, dtype, trust_remote_code)
    network, profile = _load(
        profile, lambda: load_sequence_classification_model(profile.path, lazy=True), dtype, trust_remote_code
    )
    pad_id = _pad_id(profile)
    return EncoderModel(
        kind="cross-encoder",
        profile=profile,
        tokenizer=load_tokenizer(profile, trust_remote_code=trust_remote_code),
        max_tokens=_max_tokens(profile),
        dimensions=1,
        compute=lambda rows: _numpy(_run(network, pad_id, rows).logits)[:, 0],
        has_sigmoid=not _names_identity(config),
    )


def _load_generative(profile: ModelProfile, dtype: str, trust_remote_code: bool) -> EncoderModel:
    """Qwen3-Reranker: the raw score is how much likelier "yes" is than "no" after the prompt, as log-odds."""
    network, profile = _load(
        profile, lambda: mlx_lm.utils.load_model(profile.path, lazy=True)[0], dtype, trust_remote_code
    )
    tokenizer = load_tokenizer(profile, trust_remote_code=trust_remote_code)
    answers = [tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no")]
    if None in answers or len(set(answers)) != 2:
        raise ModelLoadError(f'{profile.name} has no tokens "yes" and "no"; it is no Qwen3-Reranker.')

    def compute(rows: Sequence[TokenRow]) -> np.ndarray:
        # Attention is causal, so padding on the right is never seen by the token that is asked.
        ids, _ = _padded(rows, 0)
        last = mx.array([len(row) - 1 for row in rows])
        hidden = network.model(ids)[mx.arange(len(rows)), last]
        tied = "lm_head" not in network
        logits = network.model.embed_tokens.as_linear(hidden) if tied else network.lm_head(hidden)
        return _numpy(logits[:, answers[0]] - logits[:, answers[1]])

    return EncoderModel("generative", profile, tokenizer, min(_max_tokens(profile), 8192), 1, compute)


def _load(
    profile: ModelProfile, load: Callable[[], nn.Module], dtype: str, trust_remote_code: bool
) -> tuple[nn.Module, ModelProfile]:
    """The network with its weights in the precision of this machine, and the profile as it then is."""
    require_tokenizer(profile)
    if not trust_remote_code:
        refuse_remote_code(profile)
    has_gpu = mx.default_device().type == mx.gpu
    precision = choose_precision(
        dtype,
        is_cpu=not has_gpu,
        num_parameters=profile.num_parameters,
        is_quantized=profile.quantization is not None,
        stored_dtype=profile.dtype,
        available_bytes=available_memory_bytes(mx.device_info(), has_gpu=has_gpu),
    )
    with loading(profile):
        network = load()
        apply_precision(network, precision)
    return network, with_precision(profile, network, precision.note)


def _run(network: nn.Module, pad_id: int, rows: Sequence[TokenRow]) -> Any:
    ids, mask = _padded(rows, pad_id)
    if all(row.type_ids is None for row in rows):
        return network(ids, attention_mask=mask)
    type_rows = [TokenRow(row.type_ids or (0,) * len(row)) for row in rows]
    return network(ids, attention_mask=mask, token_type_ids=_padded(type_rows, 0)[0])


def _padded(rows: Sequence[TokenRow], pad_id: int) -> tuple[mx.array, mx.array]:
    """Ids and mask, both (rows, longest row), padded on the right."""
    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), pad_id, np.int32)
    mask = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row.token_ids
        mask[i, : len(row)] = 1
    return mx.array(ids), mx.array(mask)


def _numpy(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))


def _pad_id(profile: ModelProfile) -> int:
    """XLM-RoBERTa counts positions by it; to the others the mask is enough."""
    value = read_json(profile.path / "config.json").get("pad_token_id")
    return value if isinstance(value, int) else 0


def _max_tokens(profile: ModelProfile) -> int:
    """Positions the network has, or fewer where sentence-transformers' or the tokenizer's files say so."""
    limit = profile.context_tokens
    if profile.model_type.replace("-", "_") in ("xlm_roberta", "roberta"):
        limit -= _pad_id(profile) + 1  # its positions begin behind the padding's
    for name, key in (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        value = read_json(profile.path / name, required=False).get(key)
        if isinstance(value, int | float) and 0 < value < limit:
            limit = int(value)
    return limit


def _names_identity(config: Any) -> bool:
    """sentence-transformers' cross-encoders say in config.json what stands behind the last layer."""
    ours = config.get("sentence_transformers")
    name = ours.get("activation_fn") if isinstance(ours, dict) else None
    return str(name or config.get("sbert_ce_default_activation_function") or "").endswith("Identity")
