"""Qwen2-VL: patches with a grid, M-RoPE, one run of pad tokens for an image or a whole clip."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..family import Prepared
from ..mrope import MRopeFamily
from ..span import VideoFrames

if TYPE_CHECKING:
    from PIL.Image import Image


class ModelFamily(MRopeFamily):
    @property
    def placeholders(self) -> Mapping[str, str]:
        return {"image": self.processor.image_token, "video": self.processor.video_token}

    def media_token_ids(self, kind: str) -> frozenset[int]:
        return frozenset({self.processor.image_token_id if kind == "image" else self.processor.video_token_id})

    def prepare_image(self, image: Image) -> Prepared:
        out = self.processor.image_processor(images=[image])
        grid = np.asarray(out["image_grid_thw"])
        n = int(grid[0].prod()) // self.merge_size**2
        inputs = {"pixel_values": np.asarray(out["pixel_values"]), "image_grid_thw": grid}
        return Prepared(text=self.processor.image_token * n, num_media_tokens=n, inputs=inputs)

    def prepare_video(self, video: VideoFrames) -> Prepared:
        out = self.processor.video_processor(videos=[list(video.frames)])
        grid = np.asarray(out["video_grid_thw"])
        n = int(grid[0].prod()) // self.merge_size**2
        inputs = {"pixel_values_videos": np.asarray(out["pixel_values_videos"]), "video_grid_thw": grid}
        return Prepared(text=self.video_text(grid[0], video), num_media_tokens=n, inputs=inputs)

    def video_text(self, grid: np.ndarray, video: VideoFrames) -> str:
        return str(self.processor.video_token) * (int(grid.prod()) // self.merge_size**2)
