"""A transcription as its segments are written: SubRip and WebVTT, both valid whatever a model says. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vllm_mlx.generation.speech import Segment

SHORTEST_S = 0.001


def srt(segments: Iterable[Segment]) -> str:
    cues = [
        f"{number}\n{_time(start, ',')} --> {_time(end, ',')}\n{text}\n"
        for number, (start, end, text) in enumerate(_cues(segments), 1)
    ]
    return "\n".join(cues)


def vtt(segments: Iterable[Segment]) -> str:
    cues = [
        f"{_time(start, '.')} --> {_time(end, '.')}\n{_escaped(text)}\n" for start, end, text in _cues(segments)
    ]
    return "\n".join(["WEBVTT\n", *cues])


def _cues(segments: Iterable[Segment]) -> Iterator[tuple[float, float, str]]:
    """Starts that never go back, ends behind them, texts of one line without the arrow that stands between times."""
    latest = 0.0
    for segment in segments:
        text = " ".join(segment.text.split()).replace("-->", "->")
        if not text:
            continue
        latest = max(latest, segment.start)
        yield latest, max(segment.end, latest + SHORTEST_S), text


def _time(seconds: float, point: str) -> str:
    milliseconds = round(seconds * 1000)
    hours, rest = divmod(milliseconds, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    whole, milliseconds = divmod(rest, 1000)
    return f"{hours:02d}:{minutes:02d}:{whole:02d}{point}{milliseconds:03d}"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
