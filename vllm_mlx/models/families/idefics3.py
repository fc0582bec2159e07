"""Idefics3 and SmolVLM: an image may be cut into tiles, each its own run of tokens between row and column marks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..family import Family, Prepared

if TYPE_CHECKING:
    from PIL.Image import Image

FAKE, GLOBAL = "<fake_token_around_image>", "<global-img>"


class ModelFamily(Family):
    def prepare_image(self, image: Image) -> Prepared:
        out = self.processor.image_processor([[image]], return_row_col_info=True, return_tensors="np")
        rows, cols = int(out["rows"][0][0]), int(out["cols"][0][0])
        run = self.image_token * int(self.processor.image_seq_len)
        tiles = "".join(
            "".join(f"{FAKE}<row_{r + 1}_col_{c + 1}>{run}" for c in range(cols)) + "\n" for r in range(rows)
        )
        if tiles:
            tiles += "\n"
        inputs = {"pixel_values": np.asarray(out["pixel_values"])}
        if out.get("pixel_attention_mask") is not None:
            inputs["pixel_attention_mask"] = np.asarray(out["pixel_attention_mask"])
        return Prepared(
            text=f"{tiles}{FAKE}{GLOBAL}{run}{FAKE}",
            num_media_tokens=(rows * cols + 1) * int(self.processor.image_seq_len),
            inputs=inputs,
        )
