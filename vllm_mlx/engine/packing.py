"""Which prompt chunks of a step are computed together in one forward. Pure; no MLX.

A forward costs something whatever its size, so short chunks are put together; long ones gain nothing. Rows of a pack
are padded to the longest in the layers that read the cache, so only chunks that agree well enough, in length and in
what lies before them, share one.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_mlx.engine.step import Chunk

# Longer chunks fill the device by themselves. Packs of 8192 tokens were tried on a GPU (docs/benchmarks/gpu.md).
MAX_CHUNK_TOKENS = 256
MAX_PACK_TOKENS = 1024
# Tokens a pack is padded to, for each real one; and the same counted with the tokens before the chunks.
MAX_PADDING = 1.3


def pack_chunks(chunks: Sequence[Chunk]) -> list[tuple[Chunk, ...]]:
    """The chunks, each in exactly one pack; a pack of one is computed alone."""
    packs: list[list[Chunk]] = []
    open_pack: list[Chunk] = []
    for chunk in sorted(chunks, key=lambda c: (c.start, c.end)):
        if chunk.end - chunk.start > MAX_CHUNK_TOKENS:
            packs.append([chunk])
        elif open_pack and _fits([*open_pack, chunk]):
            open_pack.append(chunk)
        else:
            open_pack = [chunk]
            packs.append(open_pack)
    return [tuple(pack) for pack in packs]


def _fits(chunks: Sequence[Chunk]) -> bool:
    counts = [c.end - c.start for c in chunks]
    num_padded = len(chunks) * max(counts)
    if num_padded > MAX_PACK_TOKENS or num_padded > MAX_PADDING * sum(counts):
        return False
    span = len(chunks) * (max(c.start for c in chunks) + max(counts))
    return span <= MAX_PADDING * sum(c.end for c in chunks)
