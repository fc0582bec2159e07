"""Token ids to text, piece by piece: the joined pieces equal the tokenizer's own decoding of all ids.

`TokenTable` (one a model) knows how this tokenizer's tokens become text; `Detokenizer` (one a request) holds back
what is not yet whole characters. Work per token does not grow with the text. Event loop only; no tokenizer is called
on the two common paths.

Three kinds of tokenizer are told apart by the decoder they declare:

    byte-level     every token is a run of bytes (GPT-2, Llama 3, Qwen, DeepSeek ...)
    pieces         tokens are text with a mark for spaces, and byte tokens for rare characters (SentencePiece-like)
    anything else  a short window of tokens is decoded again each time
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vllm_mlx.generation.engine_port import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WINDOW = 16


class Detokenizer(Protocol):
    def feed(self, token_ids: Iterable[int]) -> str:
        """Text that the tokens complete; may be empty."""
        ...

    def flush(self) -> str:
        """The end: what was held back, with replacement characters for what never became whole."""
        ...

    @property
    def is_holding(self) -> bool:
        """Whether part of a character, or a run that is not yet decided, is held back."""
        ...


class TokenTable:
    """How a model's tokens become text; shared by all its requests."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.special_ids = frozenset(i for i, t in tokenizer.added_tokens_decoder.items() if _is_special(t))
        self._rule = _read_decoder(tokenizer)
        self._bytes: dict[int, bytes] = {}
        self._pieces: dict[int, str | int] = {}

    @property
    def kind(self) -> str:
        match self._rule:
            case ByteRule():
                return "byte-level"
            case PieceRule():
                return "pieces"
        return "window"

    def new(self, skip: frozenset[int] = frozenset()) -> Detokenizer:
        """A detokenizer for one request that leaves out the tokens in `skip`."""
        match self._rule:
            case ByteRule():
                return ByteDetokenizer(self.token_bytes, skip)
            case PieceRule() as rule:
                return PieceDetokenizer(self._piece, self._first_piece, rule, skip)
        return WindowDetokenizer(self._tokenizer, skip)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for by itself; b"" for an id that is no token."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._read_bytes(token_id)
        return found

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def _read_bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            return b""
        match self._rule:
            case ByteRule(byte_of=byte_of):
                try:
                    return bytes([byte_of[c] for c in token])
                except KeyError:
                    return token.encode()
            case PieceRule():
                piece = self._piece(token_id)
                return bytes([piece]) if isinstance(piece, int) else piece.encode()
        text = self._tokenizer.decode([token_id], skip_special_tokens=False)
        byte = _BYTE_TOKEN.fullmatch(token) if text == REPLACEMENT else None
        return bytes([int(byte[1], 16)]) if byte else text.encode()

    def _piece(self, token_id: int) -> str | int:
        """A token's text with spaces restored, or the byte (an int) a byte token stands for."""
        found = self._pieces.get(token_id)
        if found is None:
            found = self._pieces[token_id] = self._read_piece(token_id, " ")
        return found

    def _first_piece(self, token_id: int) -> str | int:
        """The same for the first token of a text, which some decoders give no leading space."""
        assert isinstance(self._rule, PieceRule)
        return self._read_piece(token_id, "") if self._rule.first_drops_spaces else self._piece(token_id)

    def _read_piece(self, token_id: int, space: str) -> str | int:
        assert isinstance(self._rule, PieceRule)
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            return ""
        byte = _BYTE_TOKEN.fullmatch(token) if self._rule.has_byte_tokens else None
        return int(byte[1], 16) if byte else token.replace(self._rule.space_mark, space)


class ByteDetokenizer:
    """Bytes in, whole characters out."""

    def __init__(self, token_bytes: Callable[[int], bytes], skip: frozenset[int]) -> None:
        self._token_bytes = token_bytes
        self._skip = skip
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_ids: Iterable[int]) -> str:
        return self._decoder.decode(b"".join([self._token_bytes(i) for i in token_ids if i not in self._skip]))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)

    @property
    def is_holding(self) -> bool:
        return bool(self._decoder.getstate()[0])


class PieceDetokenizer:
    """Text pieces, and runs of byte tokens. A run is decoded when it ends: valid UTF-8 as such, else one replacement
    character for each byte, as these tokenizers do."""

    def __init__(
        self,
        piece: Callable[[int], str | int],
        first_piece: Callable[[int], str | int],
        rule: PieceRule,
        skip: frozenset[int],
    ) -> None:
        self._piece = piece
        self._first_piece = first_piece
        self._skip = skip
        self._run = bytearray()
        self._num_to_strip = rule.num_stripped
        self._is_first = True

    def feed(self, token_ids: Iterable[int]) -> str:
        out: list[str] = []
        for token_id in token_ids:
            if token_id in self._skip:
                continue
            piece = self._first_piece(token_id) if self._is_first else self._piece(token_id)
            self._is_first = False
            if isinstance(piece, int):
                self._run.append(piece)
            else:
                out.append(self._end_run())
                out.append(piece)
        return self._strip("".join(out))

    def flush(self) -> str:
        return self._strip(self._end_run())

    @property
    def is_holding(self) -> bool:
        return bool(self._run)

    def _end_run(self) -> str:
        if not self._run:
            return ""
        run = bytes(self._run)
        self._run.clear()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(run)

    def _strip(self, text: str) -> str:
        """The first few spaces of the whole text are not text."""
        while self._num_to_strip and text:
            if text[0] != " ":
                self._num_to_strip = 0
            else:
                text = text[1:]
                self._num_to_strip -= 1
        return text


class WindowDetokenizer:
    """For tokenizers of any other kind: decode the last few tokens with and without the new ones; the difference is
    the new text. A window that ends inside a character waits, but not for ever."""

    def __init__(self, tokenizer: Tokenizer, skip: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skip = skip
        self._known: list[int] = []
        self._known_text = ""
        self._new: list[int] = []

    def feed(self, token_ids: Iterable[int]) -> str:
        out = []
        for token_id in token_ids:
            if token_id not in self._skip:
                self._new.append(token_id)
                out.append(self._advance(must=len(self._new) >= _WINDOW))
        return "".join(out)

    def flush(self) -> str:
        return self._advance(must=True) if self._new else ""

    @property
    def is_holding(self) -> bool:
        return bool(self._new)

    def _advance(self, *, must: bool) -> str:
        text = self._decode(self._known + self._new)
        if not must and (text.endswith(REPLACEMENT) or len(text) <= len(self._known_text)):
            return ""
        delta = text[len(self._known_text) :]
        self._known, self._new = self._new[-_WINDOW:], []
        self._known_text = self._decode(self._known)
        return delta

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@dataclass(frozen=True, slots=True)
class ByteRule:
    """Each character of a token's name stands for one byte."""

    byte_of: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class PieceRule:
    space_mark: str
    has_byte_tokens: bool = False
    num_stripped: int = 0
    first_drops_spaces: bool = False


def byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(b): b for b in printable}
    others = (b for b in range(256) if b not in set(printable))
    alphabet.update({chr(0x100 + n): b for n, b in enumerate(others)})
    return alphabet


def _is_special(token: Any) -> bool:
    return bool(getattr(token, "special", False))


def _read_decoder(tokenizer: Tokenizer) -> ByteRule | PieceRule | None:
    """The rule behind the decoder a fast tokenizer declares; None when it is of another kind."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    if decoder is None:
        return None
    try:
        spec = json.loads(decoder.__getstate__())
    except (TypeError, ValueError, AttributeError):
        return None
    steps = spec.get("decoders", []) if spec.get("type") == "Sequence" else [spec]
    if [s.get("type") for s in steps] == ["ByteLevel"]:
        return ByteRule(byte_alphabet())
    return _piece_rule(steps)


def _piece_rule(steps: list[dict[str, Any]]) -> PieceRule | None:
    mark = ""
    has_byte_tokens = is_fused = first_drops_spaces = False
    num_stripped = 0
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": " "} if not mark and not is_fused:
                mark = pattern
            case {"type": "Metaspace", "replacement": str(pattern)} if not mark and not is_fused:
                mark = pattern
                first_drops_spaces = step.get("prepend_scheme", "always") != "never"
            case {"type": "ByteFallback"} if not is_fused:
                has_byte_tokens = True
            case {"type": "Fuse"}:
                is_fused = True
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0} if is_fused and not num_stripped:
                num_stripped = start
            case _:
                return None
    return PieceRule(mark, has_byte_tokens, num_stripped, first_drops_spaces) if mark else None
