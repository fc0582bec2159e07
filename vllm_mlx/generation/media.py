"""Media parts to decoded pictures: upright, RGB, 8 bits, of bounded size. PIL and numpy in worker threads; no MLX.

Bytes come from `sources.py`. Whatever is wrong with them - empty, truncated, mislabelled, too large, not a picture at
all - is an InvalidRequest that names the part; nothing is skipped in silence. What a model then makes of a picture is
its own processor's matter (`models/media.py`).
"""

from __future__ import annotations

import bisect
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any

import numpy as np
from PIL import Image, ImageOps, ImageSequence

from vllm_mlx.errors import InvalidRequest
from vllm_mlx.generation.request import MediaPart
from vllm_mlx.generation.sources import Blob, MediaSources
from vllm_mlx.models.span import VideoFrames

log = logging.getLogger(__name__)

# Signatures of the formats that are decoded, and PIL's name of each.
_FORMATS: tuple[tuple[bytes, int, str], ...] = (
    (b"\x89PNG\r\n\x1a\n", 0, "PNG"),
    (b"\xff\xd8\xff", 0, "JPEG"),
    (b"WEBP", 8, "WEBP"),
    (b"GIF87a", 0, "GIF"),
    (b"GIF89a", 0, "GIF"),
    (b"BM", 0, "BMP"),
    (b"II*\x00", 0, "TIFF"),
    (b"MM\x00*", 0, "TIFF"),
)
_MEDIA_TYPES = {
    "image/png": "PNG",
    "image/apng": "PNG",
    "image/jpeg": "JPEG",
    "image/jpg": "JPEG",
    "image/webp": "WEBP",
    "image/gif": "GIF",
    "image/bmp": "BMP",
    "image/tiff": "TIFF",
}
_CONTAINERS: tuple[tuple[bytes, int], ...] = (
    (b"ftyp", 4),
    (b"\x1aE\xdf\xa3", 0),
    (b"AVI ", 8),
    (b"\x00\x00\x01\xba", 0),
)
_SUPPORTED = "PNG, JPEG, WebP, GIF, BMP and TIFF"


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """Bounds of what is decoded. Pictures above `kept_pixels` are scaled down to it; above `max_pixels` refused."""

    max_parts: int = 128
    max_side: int = 16_384
    max_pixels: int = 64_000_000
    kept_pixels: int = 16_777_216
    max_total_pixels: int = 512_000_000
    max_aspect_ratio: float = 200.0
    default_fps: float = 2.0
    max_fps: float = 30.0
    default_frames: int = 32
    max_frames: int = 128
    frame_pixels: int = 1_048_576
    max_animation_frames: int = 5_000
    max_animation_pixels: int = 2_000_000_000


class MediaLoader:
    """Loads the media of requests. Thread-safe; blocks."""

    def __init__(self, sources: MediaSources, limits: MediaLimits = MediaLimits()) -> None:
        self._sources = sources
        self._limits = limits

    def load(
        self, parts: Sequence[MediaPart], *, deadline: float | None = None
    ) -> tuple[list[Image.Image], list[VideoFrames]]:
        """Images and videos, each in the order of the parts."""
        if len(parts) > self._limits.max_parts:
            raise InvalidRequest(
                f"A request can hold at most {self._limits.max_parts} media parts, not {len(parts)}.",
                param=parts[self._limits.max_parts].param,
            )
        images: list[Image.Image] = []
        videos: list[VideoFrames] = []
        num_pixels = 0
        for part in parts:
            blob = self._sources.read(part.source, part.param, deadline=deadline)
            if part.kind == "image":
                images.append(decode_image(blob, part.param, self._limits))
                num_pixels += _area(images[-1])
            elif part.kind == "video":
                videos.append(decode_video(blob, part.param, part.options, self._limits))
                num_pixels += sum(_area(f) for f in videos[-1].frames)
            else:
                raise InvalidRequest(f"Media of kind {part.kind!r} cannot be decoded here.", param=part.param)
            if num_pixels > self._limits.max_total_pixels:
                raise InvalidRequest(
                    f"The media of one request can have {self._limits.max_total_pixels // 10**6} million pixels "
                    "together, and this part passes that.",
                    param=part.param,
                    code="media_too_large",
                )
        return images, videos


# ── images ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def decode_image(blob: Blob, param: str, limits: MediaLimits = MediaLimits()) -> Image.Image:
    """One RGB picture; of an animation, the first frame."""
    with _open(blob, param, limits) as image:
        return _to_rgb(_loaded(image, param), limits)


def _open(blob: Blob, param: str, limits: MediaLimits) -> Image.Image:
    """The header only: format and size are judged before any pixel is unpacked."""
    name = _format_of(blob, param)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of sizes that are judged below
            image = Image.open(io.BytesIO(blob.data), formats=[name])
    except Image.DecompressionBombError:
        raise InvalidRequest(
            f"The image has more than {limits.max_pixels // 10**6} million pixels.", param=param, code="media_too_large"
        ) from None
    except Exception as error:  # decoders meet hostile bytes and raise what they like
        raise _broken(name, error, param) from None
    _check_size(image.width, image.height, param, limits)
    return image


def _format_of(blob: Blob, param: str) -> str:
    data = blob.data
    if not data:
        raise InvalidRequest("The image is empty (0 bytes).", param=param, code="invalid_image")
    name = next((n for magic, at, n in _FORMATS if data[at : at + len(magic)] == magic), None)
    if name is None:
        raise InvalidRequest(f"{_guess(data)}; images are {_SUPPORTED}.", param=param, code="unsupported_image_format")
    declared = _MEDIA_TYPES.get(blob.declared or "")
    if declared is not None and declared != name:
        raise InvalidRequest(
            f"The data: URL says {blob.declared}, but the image is {name}.", param=param, code="invalid_image"
        )
    return name


def _guess(data: bytes) -> str:
    """What the bytes are instead, for the sentence of the error."""
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in head:
        return "The image is SVG, which is not a bitmap"
    if head.startswith((b"<!doctype html", b"<html")):
        return "There is a web page where the image should be"
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"mif1", b"avif"):
        return "The image is HEIC or AVIF"
    if any(data[at : at + len(magic)] == magic for magic, at in _CONTAINERS):
        return "The data are a video"
    if head.startswith(b"%pdf"):
        return "The data are a PDF document"
    return "The data are not an image that is known here"


def _check_size(width: int, height: int, param: str, limits: MediaLimits) -> None:
    if width < 1 or height < 1:
        raise InvalidRequest("The image has no pixels.", param=param, code="invalid_image")
    if max(width, height) > limits.max_side or width * height > limits.max_pixels:
        raise InvalidRequest(
            f"The image has {width} x {height} pixels; at most {limits.max_side} a side and "
            f"{limits.max_pixels // 10**6} million in all are accepted.",
            param=param,
            code="media_too_large",
        )
    if max(width, height) > limits.max_aspect_ratio * min(width, height):
        raise InvalidRequest(
            f"The image is {width} x {height} pixels; one side may be at most {limits.max_aspect_ratio:g} times the "
            "other.",
            param=param,
            code="invalid_image",
        )


def _loaded(image: Image.Image, param: str) -> Image.Image:
    """All pixels unpacked, and turned as the camera was held."""
    try:
        image.load()
    except Exception as error:  # as above
        raise _broken(image.format or "", error, param) from None
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # broken EXIF does not make a picture worthless
        log.debug("ignoring broken EXIF: %s", error)
        return image


def _broken(name: str, error: Exception, param: str) -> InvalidRequest:
    if isinstance(error, MemoryError):
        return InvalidRequest("The image needs too much memory.", param=param, code="media_too_large")
    return InvalidRequest(f"The {name} image is damaged or truncated.", param=param, code="invalid_image")


def _to_rgb(image: Image.Image, limits: MediaLimits) -> Image.Image:
    image = _to_eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = _on_white(image)
    if image.mode != "RGB":
        image = image.convert("RGB")
    return _scaled(image, limits.kept_pixels)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """16 and 32 bit grey: PIL would cut such values off at 255 rather than scale them."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image).astype(np.float32)
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min(initial=0.0)), float(values.max(initial=0.0))
    if image.mode == "F":
        scale = 255.0 / (high - low) if high > low else 0.0
        values = (values - low) * scale if low < 0 or high > 255 else values * (255.0 if high <= 1.0 else 1.0)
    else:
        bits = 8 if high <= 255 and image.mode == "I" else 16 if high <= 65535 else 32
        values = values / float(1 << (bits - 8))
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _scaled(image: Image.Image, max_pixels: int) -> Image.Image:
    if _area(image) <= max_pixels:
        return image
    scale = (max_pixels / _area(image)) ** 0.5
    size = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _area(image: Image.Image) -> int:
    return image.width * image.height


# ── videos ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def decode_video(
    blob: Blob, param: str, options: Mapping[str, Any] | None = None, limits: MediaLimits = MediaLimits()
) -> VideoFrames:
    """Frames sampled at `fps` (default 2), evenly thinned to at most `max_frames`. Animations by PIL; containers such
    as MP4 by OpenCV where it is installed."""
    fps, max_frames = _sampling(options or {}, param, limits)
    if not blob.data:
        raise InvalidRequest("The video is empty (0 bytes).", param=param, code="invalid_video")
    if any(blob.data[at : at + len(magic)] == magic for magic, at in _CONTAINERS):
        frames = _container_frames(blob.data, fps, max_frames, param, limits)
    elif any(blob.data[at : at + len(magic)] == magic for magic, at, _ in _FORMATS):
        frames = _animation_frames(blob, fps, max_frames, param, limits)
    else:
        raise InvalidRequest(
            f"{_guess(blob.data).replace('image', 'video')}; videos are MP4, WebM, AVI, GIF, WebP or APNG.",
            param=param,
            code="unsupported_video_format",
        )
    times, pictures = zip(*frames, strict=True)
    return VideoFrames(list(pictures), list(times))


def _sampling(options: Mapping[str, Any], param: str, limits: MediaLimits) -> tuple[float, int]:
    fps = options.get("fps") or limits.default_fps
    max_frames = options.get("max_frames") or limits.default_frames
    if not 0 < fps <= limits.max_fps:
        raise InvalidRequest(f"video_fps must be above 0 and at most {limits.max_fps:g}, not {fps}.", param="video_fps")
    if not 1 <= max_frames <= limits.max_frames:
        raise InvalidRequest(
            f"video_max_frames must be between 1 and {limits.max_frames}, not {max_frames}.", param="video_max_frames"
        )
    return float(fps), int(max_frames)


def sample_times(duration_s: float, fps: float, max_frames: int) -> list[float]:
    """When to look: the middles of equal stretches, `fps` of them a second, at least one."""
    count = max(1, min(max_frames, int(duration_s * fps + 1e-6)))
    return [(i + 0.5) * duration_s / count for i in range(count)]


def _animation_frames(
    blob: Blob, fps: float, max_frames: int, param: str, limits: MediaLimits
) -> list[tuple[float, Image.Image]]:
    """Walks the animation once; only the frames that are looked at are kept."""
    with _open(blob, param, limits) as animation:
        count = _num_frames(animation, param, limits)
        durations = _durations(animation, count, param)
        starts = [0, *accumulate(durations)]
        wanted = [
            min(bisect.bisect_right(starts, round(t * 1000)) - 1, count - 1)
            for t in sample_times(starts[-1] / 1000, fps, max_frames)
        ]
        kept: list[tuple[float, Image.Image]] = []
        try:
            for i, frame in enumerate(_frames(animation)):
                if i > wanted[-1]:
                    break
                if i in wanted:
                    kept.append((starts[i] / 1000, _scaled(_to_rgb(frame.copy(), limits), limits.frame_pixels)))
        except Exception as error:  # as for images
            raise _broken(animation.format or "", error, param) from None
    return kept


def _num_frames(animation: Image.Image, param: str, limits: MediaLimits) -> int:
    """Frames build on each other, so all of them are unpacked: their pixels together are bounded."""
    try:
        count = int(getattr(animation, "n_frames", 1))
    except Exception as error:
        raise _broken(animation.format or "", error, param) from None
    if count * _area(animation) > limits.max_animation_pixels or count > limits.max_animation_frames:
        raise InvalidRequest(
            f"The animation has {count} frames of {animation.width} x {animation.height} pixels, which is too much.",
            param=param,
            code="media_too_large",
        )
    return max(1, count)


def _durations(animation: Image.Image, count: int, param: str) -> list[int]:
    """Milliseconds each frame is shown; 100 where the file says nothing."""
    try:
        return [max(10, round(frame.info.get("duration") or 100)) for frame in islice(_frames(animation), count)]
    except Exception as error:
        raise _broken(animation.format or "", error, param) from None


def _frames(animation: Image.Image) -> Iterator[Image.Image]:
    yield from ImageSequence.Iterator(animation)


def _container_frames(
    data: bytes, fps: float, max_frames: int, param: str, limits: MediaLimits
) -> list[tuple[float, Image.Image]]:
    try:
        import cv2  # optional: comes with mlx-vlm's full install
    except ImportError:
        raise InvalidRequest(
            "This server cannot decode video files; install opencv-python, or send frames as images or a GIF.",
            param=param,
            code="unsupported_video_format",
        ) from None
    with tempfile.NamedTemporaryFile(suffix=".video") as file:  # OpenCV reads files only
        file.write(data)
        file.flush()
        capture = cv2.VideoCapture(file.name)
        try:
            return _captured(capture, cv2, fps, max_frames, param, limits)
        except InvalidRequest:
            raise
        except Exception as error:
            raise InvalidRequest("The video is damaged or truncated.", param=param, code="invalid_video") from error
        finally:
            capture.release()


def _captured(
    capture: Any, cv2: Any, fps: float, max_frames: int, param: str, limits: MediaLimits
) -> list[tuple[float, Image.Image]]:
    width, height = int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)), int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
    native = float(capture.get(cv2.CAP_PROP_FPS))
    count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    if not capture.isOpened() or width < 1 or height < 1:
        raise InvalidRequest("The video is damaged or truncated.", param=param, code="invalid_video")
    _check_size(width, height, param, limits)
    native = native if 0 < native < 1000 else 25.0
    if not 0 < count < 10_000_000:
        raise InvalidRequest("The video does not say how long it is.", param=param, code="invalid_video")
    kept: list[tuple[float, Image.Image]] = []
    last = -1
    for moment in sample_times(count / native, fps, max_frames):
        index = min(int(moment * native), count - 1)
        if index == last:
            continue
        last = index
        capture.set(cv2.CAP_PROP_POS_FRAMES, index)
        is_read, frame = capture.read()
        if not is_read:
            break
        picture = Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
        kept.append((index / native, _scaled(picture, limits.frame_pixels)))
    if not kept:
        raise InvalidRequest("The video is damaged or truncated.", param=param, code="invalid_video")
    return kept
