"""A clip to sampled frames: animations by PIL, files such as MP4 by OpenCV where it is installed. Worker threads."""

from __future__ import annotations

import bisect
import tempfile
from collections.abc import Iterator, Mapping
from itertools import accumulate, islice
from typing import Any

from PIL import Image, ImageSequence

from vllm_mlx.errors import InvalidRequest
from vllm_mlx.generation.pictures import (
    CONTAINERS,
    FORMATS,
    MediaLimits,
    area,
    broken,
    check_size,
    guess,
    open_image,
    scaled,
    to_rgb,
)
from vllm_mlx.generation.sources import Blob
from vllm_mlx.models.span import VideoFrames


def decode_video(
    blob: Blob, param: str, options: Mapping[str, Any] | None = None, limits: MediaLimits = MediaLimits()
) -> VideoFrames:
    """Frames sampled at `fps` (default 2), evenly thinned to at most `max_frames`. Animations by PIL; containers such
    as MP4 by OpenCV where it is installed."""
    fps, max_frames = _sampling(options or {}, param, limits)
    if not blob.data:
        raise InvalidRequest("The video is empty (0 bytes).", param=param, code="invalid_video")
    if any(blob.data[at : at + len(magic)] == magic for magic, at in CONTAINERS):
        frames = _container_frames(blob.data, fps, max_frames, param, limits)
    elif any(blob.data[at : at + len(magic)] == magic for magic, at, _ in FORMATS):
        frames = _animation_frames(blob, fps, max_frames, param, limits)
    else:
        raise InvalidRequest(
            f"{guess(blob.data).replace('image', 'video')}; videos are MP4, WebM, AVI, GIF, WebP or APNG.",
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
    with open_image(blob, param, limits) as animation:
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
                    kept.append((starts[i] / 1000, scaled(to_rgb(frame.copy(), limits), limits.frame_pixels)))
        except Exception as error:  # as for images
            raise broken(animation.format or "", error, param) from None
    return kept


def _num_frames(animation: Image.Image, param: str, limits: MediaLimits) -> int:
    """Frames build on each other, so all of them are unpacked: their pixels together are bounded."""
    try:
        count = int(getattr(animation, "n_frames", 1))
    except Exception as error:  # as for images
        raise broken(animation.format or "", error, param) from None
    if count * area(animation) > limits.max_animation_pixels or count > limits.max_animation_frames:
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
    except Exception as error:  # as for images
        raise broken(animation.format or "", error, param) from None


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
        except Exception as error:  # as for images: OpenCV and its codecs meet hostile bytes too
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
    check_size(width, height, param, limits)
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
        kept.append((index / native, scaled(picture, limits.frame_pixels)))
    if not kept:
        raise InvalidRequest("The video is damaged or truncated.", param=param, code="invalid_video")
    return kept
