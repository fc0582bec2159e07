"""Qwen3-VL: Qwen2-VL with deepstack features, and clips written as one timed run of tokens for each pair of frames."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..span import VideoFrames
from .qwen2_vl import ModelFamily as Qwen2VLFamily


class ModelFamily(Qwen2VLFamily):
    has_deepstack = True

    @property
    def placeholders(self) -> Mapping[str, str]:
        return {"image": self.processor.image_token, "video": self._wrapped(self.processor.video_token)}

    def _wrapped(self, tokens: str) -> str:
        return f"{self.processor.vision_start_token}{tokens}{self.processor.vision_end_token}"

    def video_text(self, grid: np.ndarray, video: VideoFrames) -> str:
        num_groups = int(grid[0])
        per_group = int(grid[1:].prod()) // self.merge_size**2
        group_size = int(getattr(self.processor.video_processor, "temporal_patch_size", 2))
        times = list(video.times_s)
        # The processor repeats the last frame to fill the last group.
        times += times[-1:] * (num_groups * group_size - len(times))
        groups = [times[i : i + group_size] for i in range(0, num_groups * group_size, group_size)]
        run = self._wrapped(self.processor.video_token * per_group)
        return "".join(f"<{(group[0] + group[-1]) / 2:.1f} seconds>{run}" for group in groups)
