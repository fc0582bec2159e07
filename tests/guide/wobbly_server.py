"""`vllm-mlx` with a model whose answers change in company, as a kernel's might: for the divergence guard to catch.

    WOBBLE=FILE python tests/guide/wobbly_server.py serve ...

FILE holds JSON, {"2": 60, "3": 40}: where so many rows or more are computed together, every token from that position on
is another one than the row alone would get. It is read at each step; without it nothing wobbles.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vllm_mlx import blas, cli

blas.load()  # before MLX is imported, as the server does it

import mlx.core as mx  # noqa: E402

from vllm_mlx.models.text import TextModel  # noqa: E402

RULES = Path(os.environ["WOBBLE"])
decode_well = TextModel.decode


def decode(self: TextModel, tokens: mx.array, positions: Any, cache: Any, states: Any) -> mx.array:
    logits = decode_well(self, tokens, positions, cache, states)
    rules = json.loads(RULES.read_text()) if RULES.exists() else {}
    first = min((at for rows, at in rules.items() if len(positions) >= int(rows)), default=None)
    if first is None:
        return logits
    is_off = mx.array([position >= first for position in positions])[:, None]
    return mx.where(is_off, mx.roll(logits, 1, axis=-1), logits)


if __name__ == "__main__":
    TextModel.decode = decode  # type: ignore[method-assign]
    raise SystemExit(cli.main())
