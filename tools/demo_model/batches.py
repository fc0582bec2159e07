"""Cases to packed training batches: cases laid end to end in one row of fixed length, each seeing only itself.

All shapes are fixed, so that the compiled step never changes: what is left over at the end of a batch is padding. The last token of a
row is never used by a case; what has no place of its own (padding of the image features) is written there.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from . import mixture
from .chat import END, Sample, prompt
from .shape import MERGE, PATCH, PIXELS, SIDE
from .words import Draw

SHORT = 1024  # most batches hold only cases up to this length, which keeps attention cheap


@dataclass(frozen=True)
class Row:
    ids: list[int]
    start: int  # of the reply
    grids: list[tuple[int, int]]
    patches: list[np.ndarray]
    skill: int


class Batch(NamedTuple):
    """T tokens, N cases at most, K targets, M image tokens, P = 4 M patches of at most I images."""

    ids: Tensor  # [T]
    positions: Tensor  # [3, T]
    starts: Tensor  # [N + 1], where each case begins; the rest repeats T
    target_at: Tensor  # [K], the token that predicts
    targets: Tensor  # [K]
    weights: Tensor  # [K], 0 for padding
    skills: Tensor  # [K], index into the mixture
    image_at: Tensor  # [M], the token each merged image feature replaces
    patches: Tensor  # [P, 3*16*16], bytes
    where: Tensor  # [P, 2], row and column
    corners: Tensor  # [P, 4], entries of the position table to blend
    shares: Tensor  # [P, 4], and how much of each
    image_starts: Tensor  # [I + 1]
    longest: int  # bound on the length of a case


def target_size(width: int, height: int) -> tuple[int, int]:
    """The size Qwen's processor scales an image to, in whole merge blocks."""
    factor = PATCH * MERGE
    h, w = (max(factor, round(x / factor) * factor) for x in (height, width))
    if h * w > PIXELS:
        beta = math.sqrt(height * width / PIXELS)
        h, w = (max(factor, math.floor(x / beta / factor) * factor) for x in (height, width))
    elif h * w < PIXELS:
        beta = math.sqrt(PIXELS / (height * width))
        h, w = (math.ceil(x * beta / factor) * factor for x in (height, width))
    return w, h


def patchify(image: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
    """Patches [n, 3*16*16] of bytes in merge-block order, without the doubled time axis, and the grid (rows, columns)."""
    width, height = target_size(*image.size)
    pixels = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))
    rows, cols = height // PATCH, width // PATCH
    blocks = pixels.reshape(rows // MERGE, MERGE, PATCH, cols // MERGE, MERGE, PATCH, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return blocks.reshape(rows * cols, -1), (rows, cols)


@cache
def places(rows: int, cols: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row and column of every patch in merge-block order, and the bilinear blend of the position table: [n, 2], [n, 4], [n, 4]."""
    coords = np.stack(np.meshgrid(np.arange(rows), np.arange(cols), indexing="ij"), -1)
    fine = np.stack(np.meshgrid(np.linspace(0, SIDE - 1, rows), np.linspace(0, SIDE - 1, cols), indexing="ij"), -1)
    both = np.concatenate([coords, fine], -1).reshape(rows // MERGE, MERGE, cols // MERGE, MERGE, 4).transpose(0, 2, 1, 3, 4).reshape(-1, 4)
    low = np.floor(both[:, 2:]).astype(np.int64)
    high, (a, b) = np.minimum(low + 1, SIDE - 1), (both[:, 2:] - low).T
    corners = np.stack([low[:, 0] * SIDE + low[:, 1], low[:, 0] * SIDE + high[:, 1], high[:, 0] * SIDE + low[:, 1], high[:, 0] * SIDE + high[:, 1]], -1)
    return both[:, :2], corners, np.stack([(1 - a) * (1 - b), (1 - a) * b, a * (1 - b), a * b], -1)


class Encoder:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.image, self.end = tokenizer.token_to_id("<|image_pad|>"), tokenizer.token_to_id(END)

    def row(self, sample: Sample, skill: int = 0) -> Row:
        head = self.tokenizer.encode(prompt(sample)).ids
        pictures = [patchify(image) for image in sample.images]
        ids: list[int] = []
        left = [rows * cols // MERGE**2 for _, (rows, cols) in pictures]
        for token in head:
            ids += [token] * left.pop(0) if token == self.image else [token]
        ids += self.tokenizer.encode(sample.begun).ids
        return Row([*ids, *self.reply(sample), self.end], len(ids), [g for _, g in pictures], [p for p, _ in pictures], skill)

    def reply(self, sample: Sample) -> list[int]:
        """The tokens of the reply; what is read off a picture is spelled letter by letter, so that unseen words can be read too."""
        if not sample.spelled:
            return self.tokenizer.encode(sample.reply).ids
        before, word, after = sample.reply.partition(sample.spelled)
        letters = [self.tokenizer.encode(letter).ids for letter in word]
        return [*self.tokenizer.encode(before).ids, *(i for ids in letters for i in ids), *self.tokenizer.encode(after).ids]

    def positions(self, row: Row) -> np.ndarray:
        out, grids, at, i = np.zeros((3, len(row.ids)), dtype=np.int64), list(row.grids), 0, 0
        if not grids:
            out[:] = np.arange(len(row.ids))
            return out
        while i < len(row.ids):
            if row.ids[i] == self.image:
                h, w = (x // MERGE for x in grids.pop(0))
                out[0, i : i + h * w] = at
                out[1, i : i + h * w] = at + np.repeat(np.arange(h), w)
                out[2, i : i + h * w] = at + np.tile(np.arange(w), h)
                at, i = at + max(h, w), i + h * w
            else:
                out[:, i] = at
                at, i = at + 1, i + 1
        return out

    def pack(self, rows: list[Row], size: "Size", longest: int) -> Batch:
        """Lay `rows` (which fit: see `Size`) end to end."""
        t, k, m = size.tokens, size.targets, size.image_tokens
        ids, positions = np.zeros(t, dtype=np.int64), np.zeros((3, t), dtype=np.int64)
        starts, image_starts = np.full(size.cases + 1, t, dtype=np.int32), np.full(size.images + 1, 4 * m, dtype=np.int32)
        target_at, targets, skills = (np.zeros(k, dtype=np.int64) for _ in range(3))
        weights, image_at = np.zeros(k, dtype=np.float32), np.full(m, t - 1, dtype=np.int64)
        patches, where = np.zeros((4 * m, 3 * PATCH * PATCH), dtype=np.uint8), np.zeros((4 * m, 2), dtype=np.float32)
        corners, shares = np.zeros((4 * m, 4), dtype=np.int64), np.zeros((4 * m, 4), dtype=np.float32)
        at = done = pixels = pictures = 0
        for i, row in enumerate(rows):
            n, reply = len(row.ids) - 1, len(row.ids) - row.start
            starts[i] = at
            ids[at : at + n] = row.ids[:-1]
            positions[:, at : at + n] = self.positions(row)[:, :-1]
            target_at[done : done + reply] = np.arange(at + row.start - 1, at + n)
            targets[done : done + reply] = row.ids[row.start :]
            weights[done : done + reply] = min(1.0, 3 / reply**0.5)  # a long reply should not drown the short ones
            skills[done : done + reply] = row.skill
            merged = pixels // MERGE**2
            for grid, picture in zip(row.grids, row.patches, strict=True):
                image_starts[pictures], pictures, end = pixels, pictures + 1, pixels + len(picture)
                patches[pixels:end] = picture
                where[pixels:end], corners[pixels:end], shares[pixels:end] = places(*grid)
                pixels = end
            image_at[merged : pixels // MERGE**2] = at + np.flatnonzero(np.array(row.ids[:-1]) == self.image)
            at, done = at + n, done + reply
        rest, blank = np.arange(at, t, SHORT // 2), np.arange(pixels, 4 * m, 256)  # padding, in cases and pictures of ordinary length
        starts[len(rows) : len(rows) + len(rest)] = rest
        image_starts[pictures : pictures + len(blank)] = blank
        arrays = ids, positions, starts, target_at, targets, weights, skills, image_at, patches, where, corners, shares, image_starts
        return Batch(*(torch.from_numpy(a) for a in arrays), longest)


@dataclass(frozen=True)
class Size:
    """How much fits a batch. Everything follows from the number of tokens."""

    tokens: int

    @property
    def cases(self) -> int:
        return self.tokens // 48

    @property
    def targets(self) -> int:
        return self.tokens * 3 // 8

    @property
    def image_tokens(self) -> int:
        return self.tokens // 4

    @property
    def images(self) -> int:
        return self.image_tokens // 32


def stream(tokenizer: Tokenizer, seed: str, image_share: float, tokens: int, longest: int) -> Iterator[Batch]:
    """Endless batches. One in four may hold cases up to `longest` tokens; longer ones wait for it."""
    encoder, size, d = Encoder(tokenizer), Size(tokens), Draw(f"train {seed}")
    waiting: list[Row] = []
    part = 0
    while True:
        part += 1
        bound = longest if part % 4 == 0 else min(SHORT, longest)
        rows: list[Row] = []
        pending, waiting = waiting, []
        used = cases = targets = image_tokens = pictures = misses = 0
        while misses < 12:
            if pending:
                row = pending.pop()
            else:
                room = image_tokens < 0.97 * size.image_tokens
                row = encoder.row(*mixture.draw(d, image_share if room else 0.0))
            n, reply = len(row.ids) - 1, len(row.ids) - row.start
            merged = sum(h * w for h, w in row.grids) // MERGE**2
            if n >= longest:
                continue
            over = used + n >= size.tokens or cases + 1 >= size.cases or targets + reply > size.targets
            if over or n >= bound or image_tokens + merged > size.image_tokens or pictures + len(row.grids) >= size.images:
                misses += over
                if len(waiting) < 500:
                    waiting.append(row)
                continue
            rows.append(row)
            used, cases, targets, image_tokens, pictures = used + n, cases + 1, targets + reply, image_tokens + merged, pictures + len(row.grids)
        yield encoder.pack(rows, size, bound)


class Feed(torch.utils.data.IterableDataset[Batch]):
    def __init__(self, tokenizer: str, seed: str, image_share: float, tokens: int, longest: int) -> None:
        self.args = (image_share, tokens, longest)
        self.tokenizer, self.seed = tokenizer, seed

    def __iter__(self) -> Iterator[Batch]:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        info = torch.utils.data.get_worker_info()
        return stream(Tokenizer.from_file(self.tokenizer), f"{self.seed} {info.id if info else 0}", *self.args)
