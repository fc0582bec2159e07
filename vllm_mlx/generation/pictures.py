"""One picture's bytes to pixels: upright, RGB, 8 bits, of bounded size. PIL and numpy; worker threads.

Format and size are judged by the header, before any pixel is unpacked. Decoders are foreign code that meets hostile
bytes; whatever they raise is the sender's fault and named as such.
"""

from __future__ import annotations

import io
import logging
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from vllm_mlx.errors import InvalidRequest
from vllm_mlx.generation.sources import Blob

log = logging.getLogger(__name__)

# Signatures of the formats that are decoded, and PIL's name of each.
FORMATS: tuple[tuple[bytes, int, str], ...] = (
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
CONTAINERS: tuple[tuple[bytes, int], ...] = (
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
    low_detail_pixels: int = 512 * 512
    max_total_pixels: int = 512_000_000
    max_aspect_ratio: float = 200.0
    default_fps: float = 2.0
    max_fps: float = 30.0
    default_frames: int = 32
    max_frames: int = 128
    frame_pixels: int = 1_048_576
    max_sound_s: float = 600.0
    max_animation_frames: int = 5_000
    max_animation_pixels: int = 2_000_000_000


def decode_image(
    blob: Blob, param: str, limits: MediaLimits = MediaLimits(), *, is_low_detail: bool = False
) -> Image.Image:
    """One RGB picture; of an animation, the first frame. In low detail, no more pixels than `low_detail_pixels`."""
    with open_image(blob, param, limits) as image:
        picture = to_rgb(_loaded(image, param), limits)
        return scaled(picture, limits.low_detail_pixels) if is_low_detail else picture


def open_image(blob: Blob, param: str, limits: MediaLimits) -> Image.Image:
    """The header only: format and size are judged before any pixel is unpacked."""
    name = format_of(blob, param)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of sizes that are judged below
            image = Image.open(io.BytesIO(blob.data), formats=[name])
    except Image.DecompressionBombError:
        raise InvalidRequest(
            f"The image has more than {limits.max_pixels // 10**6} million pixels.", param=param, code="media_too_large"
        ) from None
    except Exception as error:  # decoders meet hostile bytes and raise what they like
        raise broken(name, error, param) from None
    check_size(image.width, image.height, param, limits)
    return image


def format_of(blob: Blob, param: str) -> str:
    """PIL's name of the format, by the bytes' signature."""
    data = blob.data
    if not data:
        raise InvalidRequest("The image is empty (0 bytes).", param=param, code="invalid_image")
    name = next((n for magic, at, n in FORMATS if data[at : at + len(magic)] == magic), None)
    if name is None:
        raise InvalidRequest(f"{guess(data)}; images are {_SUPPORTED}.", param=param, code="unsupported_image_format")
    declared = _MEDIA_TYPES.get(blob.declared or "")
    if declared is not None and declared != name:
        raise InvalidRequest(
            f"The data: URL says {blob.declared}, but the image is {name}.", param=param, code="invalid_image"
        )
    return name


def guess(data: bytes) -> str:
    """What the bytes are instead, for the sentence of the error."""
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in head:
        return "The image is SVG, which is not a bitmap"
    if head.startswith((b"<!doctype html", b"<html")):
        return "There is a web page where the image should be"
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"mif1", b"avif"):
        return "The image is HEIC or AVIF"
    if any(data[at : at + len(magic)] == magic for magic, at in CONTAINERS):
        return "The data are a video"
    if head.startswith(b"%pdf"):
        return "The data are a PDF document"
    return "The data are not an image that is known here"


def check_size(width: int, height: int, param: str, limits: MediaLimits) -> None:
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
        raise broken(image.format or "", error, param) from None
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # broken EXIF does not make a picture worthless
        log.debug("ignoring broken EXIF: %s", error)
        return image


def broken(name: str, error: Exception, param: str) -> InvalidRequest:
    if isinstance(error, MemoryError):
        return InvalidRequest("The image needs too much memory.", param=param, code="media_too_large")
    return InvalidRequest(f"The {name} image is damaged or truncated.", param=param, code="invalid_image")


def to_rgb(image: Image.Image, limits: MediaLimits) -> Image.Image:
    image = _to_eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = _on_white(image)
    if image.mode != "RGB":
        image = image.convert("RGB")
    return scaled(image, limits.kept_pixels)


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


def scaled(image: Image.Image, max_pixels: int) -> Image.Image:
    if area(image) <= max_pixels:
        return image
    scale = (max_pixels / area(image)) ** 0.5
    size = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def area(image: Image.Image) -> int:
    return image.width * image.height
