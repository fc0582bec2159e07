"""From a model folder to something the engine can run: weights, tokenizer, processor, profile. MLX thread only.

Text checkpoints go through mlx-lm, multimodal ones through mlx-vlm; the two stacks' classes never meet. Whatever is
wrong with a folder ends as one `ModelLoadError`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx_lm.models.activations
import mlx_lm.utils

from ..errors import ModelLoadError
from . import prompt_attention, row_kernels
from .base import LanguageModel
from .memory import available_memory_bytes
from .mtp import MtpTextModel, read_head
from .profile import ModelProfile, read_profile
from .stack import load_tokenizer, loading, refuse_remote_code, require_tokenizer, with_precision
from .text import TextModel
from .weights import Precision, apply_precision, choose_precision

if TYPE_CHECKING:
    from .media import MediaProcessor
    from .whole import WholeMedia

__all__ = ["LoadedModel", "load", "read_profile"]


@dataclass
class LoadedModel:
    """`tokenizer` is transformers' own object; `processor` and `media` are None for a model served as text."""

    model: LanguageModel
    tokenizer: Any
    processor: Any
    profile: ModelProfile
    media: MediaProcessor | WholeMedia | None


def load(
    path: Path | str,
    *,
    mllm: bool | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    memory_limit_bytes: int | None = None,
    unpack_limit_bytes: int | None = None,
    split: Callable[[Any], None] | None = None,
    with_head: bool = False,
) -> LoadedModel:
    """Load the model in folder `path`. `mllm`: True demands encoders, False leaves them out, None goes by metadata.

    `split` takes this rank's part of a text model before its weights are read (`sharding.py`).
    `with_head`: with the checkpoint's head for the token after next, if it has one (`mtp.py`).
    `--dtype auto` makes float32 of the weights on a CPU only if they then take at most `unpack_limit_bytes`.
    """
    row_kernels.install(mlx_lm.models.activations)
    prompt_attention.install()
    profile = read_profile(path)
    if mllm and not profile.is_multimodal:
        raise ModelLoadError(f"{profile.name} has no image, video or audio encoder; serve it without --mllm.")
    require_tokenizer(profile)
    has_gpu = mx.default_device().type == mx.gpu
    available = available_memory_bytes(mx.device_info(), has_gpu=has_gpu)
    if memory_limit_bytes is not None:
        available = min(available, memory_limit_bytes)
    if profile.weights_bytes > available:
        raise ModelLoadError(
            f"{profile.name} needs {_gib(profile.weights_bytes)} for its weights, but {_gib(available)} of memory is "
            "available; use a smaller or more strongly quantised version."
        )
    precision = choose_precision(
        dtype,
        is_cpu=not has_gpu,
        num_parameters=profile.num_parameters,
        is_quantized=profile.quantization is not None,
        stored_dtype=profile.dtype,
        available_bytes=available,
        unpack_limit_bytes=unpack_limit_bytes,
    )
    if not profile.is_multimodal:
        return _load_text(
            profile, precision, trust_remote_code=trust_remote_code, split=split, with_head=with_head
        )
    as_text = replace(profile, is_multimodal=False, modalities=frozenset({"text"}))
    if mllm is False or split is not None:
        return _load_text(as_text, precision, trust_remote_code=trust_remote_code, split=split)

    from .multimodal import load_multimodal  # mlx-vlm is slow to import and text models do not need it

    try:
        if not trust_remote_code:
            refuse_remote_code(profile)
        return load_multimodal(profile, precision, trust_remote_code=trust_remote_code)
    except ModelLoadError as error:
        if mllm:
            raise
        note = f"served without its encoders: {error}"
        try:
            return _load_text(
                replace(as_text, notes=(*profile.notes, note)), precision, trust_remote_code=trust_remote_code
            )
        except ModelLoadError:
            raise error from None


def _load_text(
    profile: ModelProfile,
    precision: Precision,
    *,
    trust_remote_code: bool,
    split: Callable[[Any], None] | None = None,
    with_head: bool = False,
) -> LoadedModel:
    head = None
    with loading(profile):
        weights, _ = mlx_lm.utils.load_model(profile.path, lazy=True, trust_remote_code=trust_remote_code)
        if split is not None:
            split(weights)
        apply_precision(weights, precision)
        if with_head and (head := read_head(weights, profile)) is not None:
            apply_precision(head, precision)
    profile = with_precision(profile, weights, precision.note)
    tokenizer = load_tokenizer(profile, trust_remote_code=trust_remote_code)
    model = TextModel(weights, profile) if head is None else MtpTextModel(weights, profile, head)
    return LoadedModel(model=model, tokenizer=tokenizer, processor=None, profile=model.profile, media=None)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.1f} GiB"
