"""The token range of one piece of media, with what its encoder needs. Frozen; numpy only; made on worker threads.

It lives here, in the lowest layer that reads it; `engine.request` shows it to the layers above.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


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
