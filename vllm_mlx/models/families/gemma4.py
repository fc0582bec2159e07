"""Gemma 4: pictures keep their shape, within a budget of soft tokens, which may see each other in both directions; a
sound is a soft token for each 40 ms, where the checkpoint has ears.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ...errors import InvalidRequest
from ..family import Family, Prepared
from ..sound import SAMPLE_RATE
from ..span import SoundClip

if TYPE_CHECKING:
    from PIL.Image import Image


class ModelFamily(Family):
    @property
    def atomic_spans(self) -> bool:
        return bool(self.config.get("text_config", {}).get("use_bidirectional_attention") == "vision")

    @property
    def placeholders(self) -> Mapping[str, str]:
        hears = self.config.get("audio_config") and self.processor.audio_token
        return {"image": self.image_token, **({"audio": self.processor.audio_token} if hears else {})}

    def media_token_ids(self, kind: str) -> frozenset[int]:
        return frozenset({int(self.processor.audio_token_id if kind == "audio" else self.processor.image_token_id)})

    def prepare_image(self, image: Image) -> Prepared:
        out, num_tokens = self.processor.image_processor([image])
        n = int(num_tokens[0])
        return Prepared(
            text=f"{self.processor.boi_token}{self.image_token * n}{self.processor.eoi_token}",
            num_media_tokens=n,
            inputs={"pixel_values": np.asarray(out["pixel_values"], dtype=np.float32)},
        )

    def prepare_audio(self, clip: SoundClip) -> Prepared:
        processor = self.processor
        n = math.ceil(len(clip.samples) / SAMPLE_RATE * 1000 / processor.audio_ms_per_token)
        if n > processor.audio_seq_length:
            seconds = processor.audio_seq_length * processor.audio_ms_per_token / 1000
            raise InvalidRequest(
                f"{self.profile.name} takes sounds of at most {seconds:g} seconds; cut this one.",
                param="messages",
                code="unsupported_media",
            )
        out = processor.feature_extractor([clip.samples], sampling_rate=SAMPLE_RATE, return_attention_mask=True)
        return Prepared(
            text=f"{processor.boa_token}{processor.audio_token * n}{processor.eoa_token}",
            num_media_tokens=n,
            inputs={
                "input_features": np.asarray(out["input_features"], dtype=np.float32),
                "input_features_mask": np.asarray(out["input_features_mask"]),
            },
        )
