"""From a rendered prompt and decoded pictures to token ids and media spans. Worker threads; numpy, no MLX arrays.

Pictures come in already bounded, upright and RGB. What a family makes of one is kept by content, so that a conversation
about the same pictures does not resize them again at every turn.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InvalidRequest
from .family import Family, Prepared
from .span import Clip, MediaSpan, SoundClip, VideoFrames

if TYPE_CHECKING:
    from PIL.Image import Image

_KEPT_BYTES = 256 << 20


class MediaProcessor:
    """Thread-safe. `placeholders` says, for each kind of media, how the chat template writes one piece of it."""

    def __init__(self, family: Family, tokenizer: Any, *, kept_bytes: int = _KEPT_BYTES) -> None:
        self._family = family
        self._tokenizer = tokenizer
        self._kept: OrderedDict[bytes, Prepared] = OrderedDict()
        self._kept_bytes = 0
        self._max_kept_bytes = kept_bytes
        self._lock = threading.Lock()
        self.placeholders = dict(family.placeholders)

    def expand(
        self,
        text: str,
        images: Sequence[Image] = (),
        clips: Sequence[Clip] = (),
        *,
        add_special_tokens: bool | None = None,
    ) -> tuple[tuple[int, ...], tuple[MediaSpan, ...]]:
        """Token ids of `text` with each placeholder grown to its media's tokens, and the spans in order.

        `add_special_tokens` None adds a beginning token unless the template wrote it. Raises InvalidRequest when
        placeholders and media do not match in number.
        """
        media: dict[str, Sequence[Any]] = {
            "image": images,
            "video": [c for c in clips if isinstance(c, VideoFrames)],
            "audio": [c for c in clips if isinstance(c, SoundClip)],
        }
        found = self._find_placeholders(text)
        for kind, given in media.items():
            count = sum(k == kind for k, _, _ in found)
            if count != len(given):
                raise InvalidRequest(self._mismatch(kind, count, len(given)), param="messages", code="media_mismatch")

        pieces: list[str] = []
        prepared: list[tuple[str, Prepared]] = []
        iterators = {kind: iter(given) for kind, given in media.items()}
        end = 0
        for kind, start, stop in found:
            ready = self._prepare(kind, next(iterators[kind]))
            prepared.append((kind, ready))
            pieces += (text[end:start], ready.text)
            end = stop
        grown = "".join((*pieces, text[end:]))
        if add_special_tokens is None:
            bos = getattr(self._tokenizer, "bos_token", None)
            add_special_tokens = not (bos and grown.startswith(bos))
        token_ids = tuple(self._tokenizer.encode(grown, add_special_tokens=add_special_tokens))
        return token_ids, self._locate(token_ids, prepared)

    def _find_placeholders(self, text: str) -> list[tuple[str, int, int]]:
        """(kind, start, end) of each placeholder in the text, longest match first where one holds another."""
        found: list[tuple[str, int, int]] = []
        kinds = sorted(self.placeholders.items(), key=lambda item: -len(item[1]))
        pattern = re.compile("|".join(re.escape(p) for _, p in kinds))
        by_text = {p: kind for kind, p in kinds}
        for match in pattern.finditer(text):
            found.append((by_text[match.group()], match.start(), match.end()))
        return found

    def _mismatch(self, kind: str, count: int, given: int) -> str:
        name = self._family.profile.name
        placeholder = self.placeholders.get(kind)
        if placeholder is None:
            return f"{name} does not take {kind}s."
        if count > given:
            return f"The messages hold the text {placeholder!r}, which {name} keeps for {kind}s; leave it out."
        return f"The chat template of {name} wrote {count} of the {given} {kind}s given."

    def _prepare(self, kind: str, medium: Any) -> Prepared:
        key = _media_key(kind, medium)
        with self._lock:
            ready = self._kept.get(key)
            if ready is not None:
                self._kept.move_to_end(key)
                return ready
        ready = self._prepared(kind, medium)
        with self._lock:
            if key not in self._kept and ready.nbytes <= self._max_kept_bytes:
                self._kept[key] = ready
                self._kept_bytes += ready.nbytes
                while self._kept_bytes > self._max_kept_bytes:
                    _, dropped = self._kept.popitem(last=False)
                    self._kept_bytes -= dropped.nbytes
        return ready

    def _prepared(self, kind: str, medium: Any) -> Prepared:
        match kind:
            case "image":
                return self._family.prepare_image(medium)
            case "video":
                return self._family.prepare_video(medium)
            case _:
                return self._family.prepare_audio(medium)

    def _locate(self, token_ids: tuple[int, ...], prepared: Sequence[tuple[str, Prepared]]) -> tuple[MediaSpan, ...]:
        """Deal the media tokens of the prompt out to the media, in order; a span ends with its last media token."""
        spans: list[MediaSpan] = []
        at = 0
        for kind, ready in prepared:
            ids = self._family.media_token_ids(kind)
            places: list[int] = []
            while len(places) < ready.num_media_tokens and at < len(token_ids):
                if token_ids[at] in ids:
                    places.append(at)
                at += 1
            if len(places) < ready.num_media_tokens or not places:
                raise InvalidRequest(
                    f"The tokens of a {kind} were lost in the prompt of {self._family.profile.name}.",
                    param="messages",
                    code="media_mismatch",
                )
            start, end = places[0], places[-1] + 1
            inputs = {**ready.inputs, "input_ids": np.array(token_ids[start:end], dtype=np.int32)}
            spans.append(
                MediaSpan(start=start, length=end - start, kind=kind, content_hash=content_hash(inputs), inputs=inputs)
            )
        return tuple(spans)


def content_hash(inputs: dict[str, np.ndarray]) -> bytes:
    """Digest of all of an encoder's inputs: names, dtypes, shapes and every byte."""
    digest = hashlib.blake2b(digest_size=32)
    for name in sorted(inputs):
        array = np.ascontiguousarray(inputs[name])
        digest.update(f"{name}:{array.dtype.str}:{array.shape};".encode())
        digest.update(array.data if array.size else b"")
    return digest.digest()


def _media_key(kind: str, medium: Any) -> bytes:
    digest = hashlib.blake2b(kind.encode(), digest_size=32)
    if isinstance(medium, SoundClip):
        digest.update(np.ascontiguousarray(medium.samples).data)
        return digest.digest()
    frames = medium.frames if isinstance(medium, VideoFrames) else (medium,)
    for frame in frames:
        digest.update(f"{frame.mode}:{frame.size};".encode())
        digest.update(frame.tobytes())
    if isinstance(medium, VideoFrames):
        digest.update(repr(tuple(medium.times_s)).encode())
    return digest.digest()
