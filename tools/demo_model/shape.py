"""Sizes of the demo model and of its pictures. Free of torch and mlx: training and conversion both read it."""

from dataclasses import dataclass, field

PATCH, MERGE = 16, 2
PIXELS = 65_536  # every image is scaled to about this many pixels: shortest and longest edge of preprocessor_config.json
SIDE = 16  # of the square table of learned positions in the vision tower


@dataclass(frozen=True)
class VisionConfig:
    depth: int = 6
    hidden_size: int = 192
    intermediate_size: int = 768
    num_heads: int = 6
    patch_size: int = 16
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    in_channels: int = 3
    num_position_embeddings: int = SIDE**2
    deepstack_visual_indexes: tuple[int, ...] = (2,)


@dataclass(frozen=True)
class DemoConfig:
    vocab_size: int = 8192
    hidden_size: int = 320
    num_hidden_layers: int = 8
    intermediate_size: int = 768
    num_attention_heads: int = 5
    num_key_value_heads: int = 5
    head_dim: int = 64
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 8192
    mrope_section: tuple[int, int, int] = (12, 10, 10)
    vision: VisionConfig = field(default_factory=VisionConfig)


# `demo` is what ships: under 30 MB with its larger matrices in 8 bits. `tiny` is for trying the training out on a CPU.
CONFIGS = {
    "demo": DemoConfig(),
    "tiny": DemoConfig(
        hidden_size=128, num_hidden_layers=2, intermediate_size=256, num_attention_heads=2, num_key_value_heads=2,
        vision=VisionConfig(depth=2, hidden_size=64, intermediate_size=128, num_heads=2, deepstack_visual_indexes=(0,)),
    ),
}  # fmt: skip
