import base64
import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vllm_mlx.errors import InvalidRequest
from vllm_mlx.generation.audio_files import wav_header
from vllm_mlx.generation.clips import decode_video, sample_times
from vllm_mlx.generation.media import MediaLoader
from vllm_mlx.generation.pictures import MediaLimits, decode_image
from vllm_mlx.generation.request import MediaPart
from vllm_mlx.generation.sources import Blob, MediaSources

PARAM = "messages.0.content.1.image_url"
RED = (220, 30, 40)


def encode(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def red(mode="RGB", size=(8, 6)):
    return Image.new("RGB", size, RED).convert(mode)


def decode(data, declared=None, **limits):
    return decode_image(Blob(data, declared), PARAM, MediaLimits(**limits))


def data_url(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def near(pixel, wanted, by=12):
    return all(abs(int(a) - int(b)) <= by for a, b in zip(pixel, wanted, strict=True))


# ── formats ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_promised_format_becomes_rgb(kind):
    image = decode(encode(red(), kind))
    assert (image.mode, image.size) == ("RGB", (8, 6))
    assert near(image.getpixel((3, 3)), RED)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16", "I"])
def test_every_png_mode_becomes_rgb(mode):
    source = Image.fromarray(np.full((6, 8), 40_000, np.uint16)) if mode.startswith("I") else red(mode)
    assert decode(encode(source)).mode == "RGB"


def test_sixteen_bits_are_scaled_not_cut():
    image = decode(encode(Image.fromarray(np.full((4, 4), 32768, np.uint16))))
    assert near(image.getpixel((0, 0)), (128, 128, 128), 1)
    tiff = encode(Image.fromarray(np.full((4, 4), 32768, np.uint16)), "TIFF")
    assert near(decode(tiff).getpixel((0, 0)), (128, 128, 128), 1)
    floats = encode(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF")
    assert near(decode(floats).getpixel((0, 0)), (128, 128, 128), 1)


def test_cmyk_and_grey_jpegs_keep_their_colours():
    assert near(decode(encode(red("CMYK"), "JPEG")).getpixel((2, 2)), RED)
    assert near(decode(encode(Image.new("L", (8, 8), 77), "JPEG")).getpixel((2, 2)), (77, 77, 77))
    assert near(decode(encode(red("CMYK"), "TIFF")).getpixel((2, 2)), RED)


def test_what_is_transparent_is_white():
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert decode(encode(clear)).getpixel((0, 0)) == (255, 255, 255)
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert near(decode(encode(half)).getpixel((0, 0)), (255, 127, 127), 2)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0] * 256)
    assert decode(encode(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    grey = encode(Image.new("L", (4, 4), 9), transparency=9)
    assert decode(grey).getpixel((0, 0)) == (255, 255, 255)
    assert decode(encode(clear, "WEBP")).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode(encode(red(size=(32, 16)), "JPEG", exif=exif))
    assert image.size == ((32, 16) if orientation < 5 else (16, 32))


def test_broken_exif_does_not_matter():
    data = encode(red(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff garbage")
    assert decode(data).size == (8, 6)


def test_the_first_frame_of_an_animation_is_the_image():
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        assert near(decode(data).getpixel((1, 1)), (255, 0, 0), 20)


def test_large_pictures_are_scaled_down_and_too_large_ones_refused():
    data = encode(Image.new("L", (400, 300)))
    assert decode(data, kept_pixels=1200).size == (40, 30)
    for limits in ({"max_side": 399}, {"max_pixels": 119_999}):
        with pytest.raises(InvalidRequest, match="400 x 300"):
            decode(data, **limits)


def test_low_detail_is_a_quarter_of_a_million_pixels():
    data = encode(Image.new("RGB", (1024, 1024)))
    assert decode(data).size == (1024, 1024)
    low, high = loader().load([part(data, detail="low"), part(data, detail="high")])[0]
    assert (low.size, high.size) == ((512, 512), (1024, 1024))


# ── what is no image ────────────────────────────────────────────────────────────────────────────────────────────────


def png_header(width, height, depth=8, colour=2):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def gif_header(width, height):
    return (
        b"GIF89a" + struct.pack("<HH", width, height) + b"\0\0\0,\0\0\0\0" + struct.pack("<HH", width, height) + b"\0;"
    )


def bmp_header(width, height):
    return (
        b"BM"
        + struct.pack("<IHHI", 54, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    )


def tiff_header(width, height):
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8), (279, 4, 1, 10)]
    body = b"".join(struct.pack("<HHII", *t) for t in tags)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + body + b"\0\0\0\0"


WHOLE = {kind: encode(red(size=(64, 48)), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")}

HOSTILE = {
    "zero bytes": b"",
    "one byte": b"\xff",
    "text": b"hello world",
    "nul": b"\0" * 1000,
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
    "svg with prologue": b"\xef\xbb\xbf<?xml version='1.0'?>\n<svg onload='alert(1)'></svg>",
    "html": b"<!DOCTYPE html><html><body>404</body></html>",
    "pdf": b"%PDF-1.7\n...",
    "zip": b"PK\x03\x04" + b"\0" * 100,
    "elf": b"\x7fELF" + b"\0" * 100,
    "mp4": b"\0\0\0\x18ftypmp42" + b"\0" * 100,
    "heic": b"\0\0\0\x18ftypheic" + b"\0" * 100,
    "avif": b"\0\0\0\x18ftypavif" + b"\0" * 100,
    "jpeg 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0" * 60,
    "ico": b"\0\0\x01\0\x01\0" + b"\0" * 60,
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "png signature only": b"\x89PNG\r\n\x1a\n",
    "png without data": png_header(8, 8)[:33],
    "png no pixels": png_header(0, 0),
    "png 20000 px": png_header(20_000, 10),
    "png bomb": png_header(100_000, 100_000),
    "png bomb at pil's limit": png_header(13_000, 13_000),
    "png wide": png_header(16_000, 1),
    "png tall": png_header(2, 9000),
    "png deep": png_header(8, 8, depth=77),
    "png colour": png_header(8, 8, colour=99),
    "png short data": png_header(2000, 2000),
    "gif bomb": gif_header(65_535, 65_535),
    "gif empty": gif_header(8, 8),
    "gif no pixels": gif_header(0, 0),
    "bmp bomb": bmp_header(100_000, 100_000),
    "bmp negative": bmp_header(-5, 5),
    "bmp short": bmp_header(500, 500),
    "tiff bomb": tiff_header(90_000, 90_000),
    "tiff short": tiff_header(500, 500),
    "tiff loop": b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
    "webp bomb": b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\xff\xff\xff\xff\xff\xff" + b"\0" * 8,
    "webp empty": b"RIFF\x04\0\0\0WEBP",
    "jpeg marker only": b"\xff\xd8\xff\xe0",
    "jpeg no scan": WHOLE["JPEG"][:150],
    "png crc": WHOLE["PNG"][:40] + b"\xff\xff" + WHOLE["PNG"][42:],
}
for _kind, _data in WHOLE.items():
    for _part in (0.1, 0.3, 0.5, 0.8):
        HOSTILE[f"{_kind} cut at {_part}"] = _data[: int(len(_data) * _part)]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_are_refused_with_the_part_named(name):
    if name in ("GIF cut at 0.8", "WEBP cut at 0.8"):
        # What these decoders mend is a picture all the same.
        try:
            assert decode(HOSTILE[name]).size == (64, 48)
        except InvalidRequest as error:
            assert error.param == PARAM
        return
    with pytest.raises(InvalidRequest) as caught:
        decode(HOSTILE[name])
    assert caught.value.param == PARAM
    assert caught.value.code in ("invalid_image", "unsupported_image_format", "media_too_large")


@pytest.mark.parametrize("kind", WHOLE)
def test_flipped_bytes_give_a_picture_or_a_refusal(kind):
    rng = random.Random(kind)
    for _ in range(40):
        data = bytearray(WHOLE[kind])
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            assert decode(bytes(data)).mode == "RGB"
        except InvalidRequest as error:
            assert error.param == PARAM


def test_a_type_that_is_not_the_declared_one_is_refused():
    with pytest.raises(InvalidRequest, match="says image/png, but the image is JPEG"):
        decode(WHOLE["JPEG"], "image/png")
    assert decode(WHOLE["JPEG"], "image/jpg").size == (64, 48)
    assert decode(WHOLE["JPEG"], "application/octet-stream").size == (64, 48)


def test_the_cause_is_said():
    for name, word in (
        ("svg", "SVG"),
        ("html", "web page"),
        ("zero bytes", "0 bytes"),
        ("heic", "HEIC"),
        ("pdf", "PDF"),
    ):
        with pytest.raises(InvalidRequest, match=word):
            decode(HOSTILE[name])


# ── a request's media ───────────────────────────────────────────────────────────────────────────────────────────────


def loader(**limits):
    return MediaLoader(MediaSources(), MediaLimits(**limits))


def part(data, index=0, kind="image", **options):
    return MediaPart(kind, data_url(data, "application/octet-stream"), f"messages.0.content.{index}", options)


def test_parts_come_back_in_order():
    parts = [part(encode(Image.new("RGB", (8 + i, 8))), i) for i in range(3)]
    images, videos = loader().load(parts)
    assert [i.width for i in images] == [8, 9, 10] and videos == []


def test_the_bad_part_is_the_one_named():
    with pytest.raises(InvalidRequest) as caught:
        loader().load([part(WHOLE["PNG"], 0), part(b"nonsense", 1), part(WHOLE["PNG"], 2)])
    assert caught.value.param == "messages.0.content.1"


def test_parts_and_pixels_of_a_request_are_bounded():
    parts = [part(WHOLE["PNG"], i) for i in range(4)]
    with pytest.raises(InvalidRequest, match="at most 3") as caught:
        loader(max_parts=3).load(parts)
    assert caught.value.param == "messages.0.content.3"
    with pytest.raises(InvalidRequest, match="million pixels") as caught:
        loader(max_total_pixels=64 * 48 * 2).load(parts)
    assert caught.value.param == "messages.0.content.2"


def wav(seconds=0.5, rate=8000):
    samples = (np.sin(np.arange(int(seconds * rate)) / 5) * 9000).astype("<i2").tobytes()
    return wav_header(rate, len(samples)) + samples


def test_a_sound_becomes_samples_at_sixteen_thousand_a_second():
    images, (sound,) = loader().load([part(wav(), kind="audio")])
    assert not images and sound.samples.dtype == np.float32
    assert abs(len(sound.samples) - 8000) <= 2 and 0.2 < abs(sound.samples).max() < 0.4


@pytest.mark.parametrize("data", [b"", b"hello", b"RIFF\0\0\0\0WAVEnothing", WHOLE["PNG"], wav()[:30]])
def test_what_is_no_sound_is_refused_with_the_part_named(data):
    with pytest.raises(InvalidRequest) as caught:
        loader().load([part(wav(), kind="audio"), part(data, 1, kind="audio")])
    assert caught.value.param == "messages.0.content.1" and caught.value.code == "invalid_audio"
    with pytest.raises(InvalidRequest, match="longer"):
        loader(max_sound_s=0.1).load([part(wav(), kind="audio")])


# ── videos ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def animation(kind="GIF", count=10, duration=100, size=(16, 12)):
    step = 255 // count
    frames = [Image.new("RGB", size, (step * i, 0, 255 - step * i)) for i in range(count)]
    return encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=duration, loop=0)


def clip(data, **options):
    return decode_video(Blob(data), PARAM, options)


def test_sampling_looks_at_the_middles_of_equal_stretches():
    assert sample_times(4.0, 1.0, 100) == [0.5, 1.5, 2.5, 3.5]
    assert sample_times(4.0, 1.0, 2) == [1.0, 3.0]
    assert sample_times(0.1, 1.0, 5) == [0.05]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_frames_of_an_animation_are_sampled(kind):
    frames = clip(animation(kind), fps=5)
    assert frames.times_s == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9], abs=0.01)
    reds = [f.getpixel((3, 3))[0] for f in frames.frames]
    assert reds == sorted(reds) and reds[0] < 60 < 180 < reds[-1]
    assert all(f.mode == "RGB" for f in frames.frames)


def test_max_frames_thins_evenly():
    frames = clip(animation(count=20), fps=30, max_frames=4)
    assert len(frames.frames) == 4
    assert frames.times_s == pytest.approx([0.2, 0.7, 1.2, 1.7], abs=0.1)


def test_a_still_picture_is_a_clip_of_one_frame():
    assert len(clip(WHOLE["PNG"]).frames) == 1


@pytest.mark.parametrize("options", [{"fps": -1}, {"fps": 1000}, {"max_frames": 129}, {"max_frames": -3}])
def test_sampling_options_are_bounded(options):
    with pytest.raises(InvalidRequest) as caught:
        clip(animation(), **options)
    assert caught.value.param in ("video_fps", "video_max_frames")


def test_animations_that_would_unpack_to_too_much_are_refused():
    with pytest.raises(InvalidRequest, match="too much"):
        decode_video(Blob(animation()), PARAM, {}, MediaLimits(max_animation_pixels=1000))
    with pytest.raises(InvalidRequest, match="too much"):
        decode_video(Blob(animation()), PARAM, {}, MediaLimits(max_animation_frames=9))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"text",
        b"<html>",
        b"\0\0\0\x18ftypmp42" + b"\0" * 200,
        b"\x1aE\xdf\xa3" + b"\xff" * 200,
        b"RIFF\0\0\0\0AVI nope",
        animation()[:60],
    ],
)
def test_broken_clips_are_refused(data):
    with pytest.raises(InvalidRequest) as caught:
        clip(data)
    assert caught.value.param == PARAM


def test_a_video_file_is_decoded_where_a_decoder_is_installed(tmp_path):
    cv2 = pytest.importorskip("cv2")
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (32, 24))
    for i in range(20):
        writer.write(np.full((24, 32, 3), 12 * i, np.uint8))
    writer.release()
    frames = clip(path.read_bytes(), fps=2)
    assert len(frames.frames) == 4
    greys = [f.getpixel((5, 5))[0] for f in frames.frames]
    assert greys == sorted(greys) and greys[-1] > 150
