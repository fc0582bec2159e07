"""One piece of media: a clip as it comes in, a span of the prompt as it goes on. Frozen; worker threads.

No MLX. The types live here, in the lowest layer that reads them; `engine.request` shows them to the layers above.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class MediaSpan:
    """The token range that stands for one image, clip or sound.

    `inputs` are the encoder's numpy inputs exactly as the model's processor made them (for example
    `pixel_values` float32 [num_patches, patch_dim] and `image_grid_thw` int [1, 3]); `content_hash` covers all of them.
    """

    start: int
    length: int
    kind: str
    content_hash: bytes
    inputs: Mapping[str, np.ndarray]

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class VideoFrames:
    """A clip: its sampled frames (RGB), and the time of each in seconds from the start."""

    frames: Sequence[Image]
    times_s: Sequence[float]

    def __post_init__(self) -> None:
        if not self.frames or len(self.frames) != len(self.times_s):
            raise ValueError("a clip has at least one frame, and a time for each")


@dataclass(frozen=True, slots=True)
class SoundClip:
    """A sound: mono float32 samples [n], `sound.SAMPLE_RATE` a second."""

    samples: np.ndarray


Clip = VideoFrames | SoundClip
"""What lasts: moving pictures and sounds travel in one list, each kind in its own order."""
