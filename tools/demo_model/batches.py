"""Cases to padded training batches: tokens, M-RoPE positions, loss weights and image patches."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from . import mixture
from .chat import END, Sample, prompt
from .words import Draw

PATCH, MERGE = 16, 2
PIXELS = 25_600  # every image is scaled to about this many pixels: shortest and longest edge of preprocessor_config.json


@dataclass(frozen=True)
class Row:
    ids: list[int]
    start: int  # of the reply
    grids: list[tuple[int, int]]
    patches: list[np.ndarray]


@dataclass(frozen=True)
class Batch:
    ids: Tensor
    positions: Tensor
    targets: Tensor
    weights: Tensor
    images: tuple[Tensor, list[tuple[int, int]], Tensor] | None

    def to(self, device: torch.device) -> "Batch":
        images = self.images and (self.images[0].to(device), self.images[1], self.images[2].to(device))
        return Batch(self.ids.to(device), self.positions.to(device), self.targets.to(device), self.weights.to(device), images)


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
    """Patches [n, 3*16*16] in merge-block order, without the doubled time axis, and the grid (rows, columns)."""
    width, height = target_size(*image.size)
    pixels = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32) / 127.5 - 1
    rows, cols = height // PATCH, width // PATCH
    blocks = pixels.reshape(rows // MERGE, MERGE, PATCH, cols // MERGE, MERGE, PATCH, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return blocks.reshape(rows * cols, -1), (rows, cols)


class Encoder:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.image, self.end = tokenizer.token_to_id("<|image_pad|>"), tokenizer.token_to_id(END)

    def row(self, sample: Sample) -> Row:
        head = self.tokenizer.encode(prompt(sample)).ids
        pictures = [patchify(image) for image in sample.images]
        ids: list[int] = []
        left = [rows * cols // MERGE**2 for _, (rows, cols) in pictures]
        for token in head:
            ids += [token] * left.pop(0) if token == self.image else [token]
        reply = self.tokenizer.encode(sample.reply).ids
        return Row([*ids, *reply, self.end], len(ids), [g for _, g in pictures], [p for p, _ in pictures])

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

    def batch(self, rows: list[Row]) -> Batch:
        length = max(len(r.ids) for r in rows) - 1
        ids, targets = (np.zeros((len(rows), length), dtype=np.int64) for _ in range(2))
        positions, weights = np.zeros((3, len(rows), length), dtype=np.int64), np.zeros((len(rows), length), dtype=np.float32)
        for i, r in enumerate(rows):
            n = len(r.ids) - 1
            ids[i, :n], targets[i, :n] = r.ids[:-1], r.ids[1:]
            positions[:, i, :n] = self.positions(r)[:, :-1]
            reply = len(r.ids) - r.start
            weights[i, r.start - 1 : n] = min(1.0, 6 / reply**0.5 / 2)  # a long reply should not drown the short ones
        images = None
        grids = [g for r in rows for g in r.grids]
        if grids:
            pad = max(h * w for h, w in grids)
            stacked = np.zeros((len(grids), pad, 3 * PATCH * PATCH), dtype=np.float32)
            for i, p in enumerate(p for r in rows for p in r.patches):
                stacked[i, : len(p)] = p
            images = (torch.from_numpy(stacked), grids, torch.from_numpy(ids == self.image))
        return Batch(torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(targets), torch.from_numpy(weights), images)


def stream(tokenizer: Tokenizer, seed: str, worker: int, image_share: float, budget: int, longest: int) -> Iterator[Batch]:
    """Endless batches of at most `budget` padded tokens, cases of like length together."""
    encoder, part = Encoder(tokenizer), 0
    while True:
        d = Draw(f"train {seed} {worker} {part}")
        part += 1
        pictures: list[Row] = []
        rows: list[Row] = []
        for _ in range(400):
            row = encoder.row(mixture.draw(d, image_share))
            if len(row.ids) <= longest:
                (pictures if row.grids else rows).append(row)
        packed: list[list[Row]] = []
        for pool, cap in ((rows, budget), (pictures, budget // 2)):
            group: list[Row] = []
            for row in sorted(pool, key=lambda r: len(r.ids) + d.rng.random() * 8):
                if group and max(len(row.ids), len(group[-1].ids)) * (len(group) + 1) > cap:
                    packed.append(group)
                    group = []
                group.append(row)
            if group:
                packed.append(group)
        d.rng.shuffle(packed)
        for group in packed:
            yield encoder.batch(group)


class Feed(torch.utils.data.IterableDataset[Batch]):
    def __init__(self, tokenizer: str, seed: str, image_share: float, budget: int, longest: int) -> None:
        self.args = (seed, image_share, budget, longest)
        self.tokenizer = tokenizer

    def __iter__(self) -> Iterator[Batch]:
        info = torch.utils.data.get_worker_info()
        if info is not None:
            os.nice(5)
        seed, *rest = self.args
        return stream(Tokenizer.from_file(self.tokenizer), seed, info.id if info else 0, *rest)
