"""What loading text and multimodal models have in common: tokenizer, profile after loading, error sentences.

MLX thread only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ..errors import ModelLoadError
from .family import find_family
from .json_file import read_json
from .profile import ModelProfile

_CODE_OF_ITS_OWN = "{name} brings its own Python code; serve it with --trust-remote-code if you trust its source."
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")


@contextmanager
def loading(profile: ModelProfile) -> Iterator[None]:
    """Turn whatever a model library raises about a folder into one sentence; the cause stays attached.

    What it also logs to the root logger, where nobody listens, stays unsaid: it would be a second line.
    """
    nobody = logging.NullHandler()
    logging.getLogger().addHandler(nobody)
    try:
        yield
    except ModelLoadError:
        raise
    except MemoryError as error:
        raise ModelLoadError(f"{profile.name} does not fit in memory; use a smaller or quantised version.") from error
    except Exception as error:  # the boundary to two libraries that raise anything at all
        raise ModelLoadError(_sentence(profile, error)) from error
    finally:
        logging.getLogger().removeHandler(nobody)


def _sentence(profile: ModelProfile, error: Exception) -> str:
    text = " ".join(str(error).split())
    if len(text) > 300:
        text = text[:300] + " ..."
    lowered = text.lower()
    if "not supported" in lowered and "model type" in lowered:
        return (
            f"{profile.name} has the architecture {profile.model_type!r}, which the installed mlx-lm and mlx-vlm do "
            "not know; update them, or serve another model."
        )
    if "trust_remote_code" in lowered:
        return _CODE_OF_ITS_OWN.format(name=profile.name)
    if "parameters not in model" in lowered or "missing" in lowered and "parameters" in lowered:
        return f"The weights of {profile.name} do not fit the architecture its config.json names ({text})."
    if isinstance(error, KeyError | TypeError | AttributeError):
        return f"config.json of {profile.name} is not what {profile.model_type} needs ({type(error).__name__}: {text})."
    return f"{profile.name} cannot be loaded ({type(error).__name__}: {text})."


def with_precision(profile: ModelProfile, model: nn.Module, note: str | None) -> ModelProfile:
    """The profile as it is after loading: dtype, bytes and quantisation of the arrays that are really there."""
    sizes: dict[mx.Dtype, int] = {}
    is_packed = False
    num_bytes = 0
    for name, array in tree_flatten(model.parameters()):
        num_bytes += array.nbytes
        if mx.issubdtype(array.dtype, mx.floating):
            sizes[array.dtype] = sizes.get(array.dtype, 0) + array.size
        elif name.endswith("weight") and array.dtype == mx.uint32:
            is_packed = True
    dtype = max(sizes, key=lambda d: sizes[d], default=mx.float32)
    return replace(
        profile,
        dtype=str(dtype).removeprefix("mlx.core."),
        weights_bytes=num_bytes,
        quantization=profile.quantization if is_packed else None,
        notes=(*profile.notes, note) if note else profile.notes,
    )


def require_tokenizer(profile: ModelProfile) -> None:
    """Ask before minutes of loading; transformers would make an empty tokenizer out of nothing."""
    path = profile.path
    if not any((path / name).is_file() for name in _TOKENIZER_FILES) and not any(path.glob("*.tiktoken")):
        raise ModelLoadError(f"{path} holds no tokenizer (tokenizer.json); finish the download, or check the path.")


def refuse_remote_code(profile: ModelProfile) -> None:
    """Refuse a multimodal folder with code of its own, which some of mlx-vlm's processors would run unasked."""
    path = profile.path
    names_code = bool(read_json(path / "config.json").get("model_file"))
    for name in ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        names_code = names_code or bool(read_json(path / name, required=False).get("auto_map"))
    if names_code and any(path.glob("*.py")) and find_family(profile.model_type) is None:
        raise ModelLoadError(_CODE_OF_ITS_OWN.format(name=profile.name))


def load_tokenizer(profile: ModelProfile, *, trust_remote_code: bool) -> Any:
    """transformers' fast tokenizer of a folder, with the chat template that the profile found."""
    path = profile.path
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # any library may stand behind a tokenizer class
        if not (path / "tokenizer.json").is_file():
            raise ModelLoadError(_sentence(profile, error)) from error
        with loading(profile):
            # AutoTokenizer also validates config.json, and refuses what the model code accepts.
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    if profile.chat_template and not getattr(tokenizer, "chat_template", None):
        tokenizer.chat_template = profile.chat_template
    return tokenizer
