"""The models beside the served one: found, checked and loaded with it. Part of the composition root.

`find` blocks (downloads) and runs before MLX is loaded; `load` belongs to the MLX thread; `services` makes of what was
loaded the registry that the HTTP side looks into. A draft model is found here too, but belongs to the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_mlx.errors import SettingsError
from vllm_mlx.generation.encoding import EncodingService
from vllm_mlx.generation.oneshot import BesideModel, BesideModels, OneShots
from vllm_mlx.generation.speech import SpeechService, TranscriptionService
from vllm_mlx.models.download import Bar, resolve
from vllm_mlx.models.profile import read_profile
from vllm_mlx.settings import Settings


@dataclass(frozen=True)
class Source:
    """A model that was asked for: what it is for, its name in the API, where its files are and how large."""

    task: str
    id: str
    folder: Path
    weights_bytes: int


FLOAT32_BYTES = 4


def find(settings: Settings) -> list[Source]:
    """Fetch what the flags name; raises ModelLoadError, one sentence, for what cannot be served."""
    beside = settings.beside
    return [
        find_one(settings, task, name, name)
        for task, name in (
            ("embedding", beside.embedding_model),
            ("rerank", beside.rerank_model),
            ("transcription", beside.stt_model),
            ("speech", beside.tts_model),
        )
        if name is not None
    ]


def find_one(settings: Settings, task: str, path: str, id: str) -> Source:
    """Fetch one model, which the API will call `id`."""
    model = settings.model
    folder = resolve(
        path,
        offline=model.offline,
        timeout_s=model.download_timeout,
        retries=model.download_retries,
        progress=Bar(path),
    )
    return Source(task, id, folder, _weights_bytes(task, folder))


def memory_bytes(source: Source, *, is_cpu: bool) -> int:
    """What its weights are likely to take in memory: on a CPU, those of encoders become float32."""
    if not is_cpu or source.task not in ("embedding", "rerank"):
        return source.weights_bytes
    return max(source.weights_bytes, read_profile(source.folder).num_parameters * FLOAT32_BYTES)


def _weights_bytes(task: str, folder: Path) -> int:
    if task in ("embedding", "rerank"):
        return read_profile(folder).weights_bytes
    # The folders of audio models are as different as their makers.
    return sum(file.stat().st_size for file in folder.rglob("*") if file.suffix in (".safetensors", ".npz"))


def load(source: Source, settings: Settings) -> Any:
    """The loaded model of a source. MLX thread."""
    # These import MLX, and each a part of a library that only its users should wait for.
    if source.task == "transcription":
        from vllm_mlx.models.transcriber import load_transcriber

        return load_transcriber(source.folder)
    if source.task == "speech":
        from vllm_mlx.models.speaker import load_speaker

        return load_speaker(source.folder)
    from vllm_mlx.models import encoder

    loaders = {"embedding": encoder.load_embedder, "rerank": encoder.load_reranker}
    model = settings.model
    return loaders[source.task](source.folder, dtype=model.dtype, trust_remote_code=model.trust_remote_code)


def services(settings: Settings, oneshots: OneShots, loaded: Sequence[tuple[Source, Any]]) -> BesideModels:
    """The registry: each loaded model with the service that does its jobs."""
    return BesideModels([_serve(settings, oneshots, source, model) for source, model in loaded])


def _serve(settings: Settings, oneshots: OneShots, source: Source, model: Any) -> BesideModel:
    return BesideModel(source.id, source.task, make_service(settings, oneshots, source.task, model), model.nbytes)


def make_service(settings: Settings, oneshots: OneShots, task: str, model: Any) -> Any:
    """What does the jobs of a loaded model."""
    if task == "transcription":
        return TranscriptionService(oneshots, model)
    if task == "speech":
        return SpeechService(oneshots, model)
    beside = settings.beside
    is_embedding = task == "embedding"
    return EncodingService(
        oneshots,
        model,
        max_length=beside.embedding_max_length if is_embedding else None,
        refuses_overflow=is_embedding and beside.embedding_overflow_policy == "error",
    )


def find_draft(settings: Settings, served: Path) -> Path | None:
    """The folder of `--draft-model`, if there is one; raises SettingsError where its tokens are not the served
    model's, and ModelLoadError where it cannot be found."""
    name = settings.speculation.draft_model
    if name is None:
        return None
    model = settings.model
    folder = resolve(
        name,
        offline=model.offline,
        timeout_s=model.download_timeout,
        retries=model.download_retries,
        progress=Bar(name),
    )
    if (difference := different_tokens(served, folder)) is not None:
        raise SettingsError(f"--draft-model {name} has another tokenizer than the served model: {difference}.")
    return folder


def different_tokens(served: Path, draft: Path) -> str | None:
    """How the two models' token ids differ, in a few words; None when they are the same."""
    vocabularies = []
    for folder in (served, draft):
        file = folder / "tokenizer.json"
        if not file.is_file():
            return f"{folder.name} has no tokenizer.json to compare"
        from tokenizers import Tokenizer  # only when a draft model is asked for

        vocabularies.append(Tokenizer.from_file(str(file)).get_vocab())
    first, second = vocabularies
    if first == second:
        return None
    token = min((t for t in first.keys() | second.keys() if first.get(t) != second.get(t)), key=lambda t: (len(t), t))
    ids = [str(v[token]) if token in v else "not in it" for v in vocabularies]
    return f"{len(first)} and {len(second)} entries; {token!r} is {ids[0]} there and {ids[1]} here"
