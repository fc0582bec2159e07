"""The media parts of a request to decoded pictures and clips. Blocks; worker threads. No MLX.

Bytes come from `sources.py`, pixels from `pictures.py` and `clips.py`. Whatever is wrong - empty, truncated,
mislabelled, too large, not a picture at all - is an InvalidRequest that names the part; nothing is skipped in silence.
What a model then makes of a picture is its own processor's matter (`models/media.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from vllm_mlx.errors import InvalidRequest
from vllm_mlx.generation import audio_files
from vllm_mlx.generation.clips import decode_video
from vllm_mlx.generation.pictures import MediaLimits, area, decode_image
from vllm_mlx.generation.request import MediaPart
from vllm_mlx.generation.sources import Blob, MediaSources
from vllm_mlx.models.span import Clip, SoundClip


class MediaLoader:
    """Loads the media of requests. Thread-safe; blocks."""

    def __init__(self, sources: MediaSources, limits: MediaLimits = MediaLimits()) -> None:
        self._sources = sources
        self._limits = limits

    def load(
        self, parts: Sequence[MediaPart], *, deadline: float | None = None
    ) -> tuple[list[Image.Image], list[Clip]]:
        """Images, and what lasts (videos and sounds), each in the order of the parts."""
        if len(parts) > self._limits.max_parts:
            raise InvalidRequest(
                f"A request can hold at most {self._limits.max_parts} media parts, not {len(parts)}.",
                param=parts[self._limits.max_parts].param,
            )
        images: list[Image.Image] = []
        clips: list[Clip] = []
        num_pixels = 0
        for part in parts:
            blob = self._sources.read(part.source, part.param, deadline=deadline)
            if part.kind == "image":
                is_low = part.options.get("detail") == "low"
                images.append(decode_image(blob, part.param, self._limits, is_low_detail=is_low))
                num_pixels += area(images[-1])
            elif part.kind == "video":
                video = decode_video(blob, part.param, part.options, self._limits)
                clips.append(video)
                num_pixels += sum(area(f) for f in video.frames)
            else:
                clips.append(_sound(blob, part.param, self._limits))
            if num_pixels > self._limits.max_total_pixels:
                raise InvalidRequest(
                    f"The media of one request can have {self._limits.max_total_pixels // 10**6} million pixels "
                    "together, and this part passes that.",
                    param=part.param,
                    code="media_too_large",
                )
        return images, clips


def _sound(blob: Blob, param: str, limits: MediaLimits) -> SoundClip:
    if not blob.data:
        raise InvalidRequest("The sound is empty (0 bytes).", param=param, code="invalid_audio")
    try:
        return SoundClip(audio_files.decode(blob.data, max_clip_s=limits.max_sound_s))
    except InvalidRequest as error:  # the decoder names an uploaded file
        error.param = param
        raise
