"""The demo model in PyTorch, for training only: a compact Qwen3-VL (text decoder, vision tower, deepstack, interleaved M-RoPE).

Parameter names are Hugging Face's, so the state dict is the shipped `model.safetensors` as it stands.
Images arrive as padded patch batches; text arrives right-padded, so plain causal attention needs no mask.
"""

from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class VisionConfig:
    depth: int = 4
    hidden_size: int = 128
    intermediate_size: int = 384
    num_heads: int = 4
    patch_size: int = 16
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    in_channels: int = 3
    num_position_embeddings: int = 256
    deepstack_visual_indexes: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class DemoConfig:
    vocab_size: int = 8192
    hidden_size: int = 192
    num_hidden_layers: int = 6
    intermediate_size: int = 512
    num_attention_heads: int = 3
    num_key_value_heads: int = 3
    head_dim: int = 64
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 8192
    mrope_section: tuple[int, int, int] = (12, 10, 10)
    vision: VisionConfig = field(default_factory=VisionConfig)

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


# `small` trains on two CPU cores; `base` is for a GPU. Both stay under 30 MB as shipped (float32 and 8-bit).
CONFIGS = {
    "small": DemoConfig(),
    "base": DemoConfig(
        hidden_size=384,
        num_hidden_layers=12,
        intermediate_size=1024,
        num_attention_heads=6,
        num_key_value_heads=6,
        vision=VisionConfig(depth=6, hidden_size=192, intermediate_size=768, deepstack_visual_indexes=(1, 3)),
    ),
}


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention over [batch, heads, length, dim]; causal when there is no `bias`. On a CPU two plain products beat the fused
    kernel's backward four times over at the usual short lengths."""
    length = q.shape[-2]
    if q.is_cuda or length > 600:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None)
    if bias is None:
        bias = torch.full((length, length), -torch.inf, dtype=q.dtype).triu(1)
    bias = bias.to(q.dtype).expand(*q.shape[:2], length, length).flatten(0, 1)
    scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=q.shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(-1).to(v.dtype), v.flatten(0, 1)).view_as(q)


class Attention(nn.Module):
    def __init__(self, cfg: DemoConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        self.q_proj = nn.Linear(cfg.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(cfg.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(cfg.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, cfg.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, cfg.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, cfg.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(batch, length, self.heads, -1)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(batch, length, self.kv_heads, -1)).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.kv_heads, -1).transpose(1, 2)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        if share := self.heads // self.kv_heads - 1:
            k, v = k.repeat_interleave(share + 1, dim=1), v.repeat_interleave(share + 1, dim=1)
        out = attend(q, k, v, None)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    def __init__(self, cfg: DemoConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, cfg: DemoConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(cfg), MLP(cfg)
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class TextModel(nn.Module):
    def __init__(self, cfg: DemoConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(cfg) for _ in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        half = cfg.head_dim // 2
        inv_freq = 1.0 / cfg.rope_theta ** (torch.arange(half).float() / half)
        axis = torch.zeros(half, dtype=torch.long)
        for dim in (1, 2):  # interleaved M-RoPE: t h w t h w ..., then t to the end
            axis[dim : cfg.mrope_section[dim] * 3 : 3] = dim
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("axis", axis, persistent=False)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None, deep: list[Tensor]) -> Tensor:
        """`positions` is [3, batch, length]; `mask` marks image tokens, whose rows `deep` adds to after the first layers."""
        angles = positions[self.axis].permute(1, 2, 0).float() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        cos, sin = angles.cos(), angles.sin()
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin)
            if mask is not None and i < len(deep):
                x = x.index_put((mask,), deep[i].to(x.dtype), accumulate=True)
        return self.norm(x)


class VisionBlock(nn.Module):
    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(cfg.hidden_size, eps=1e-6), nn.LayerNorm(cfg.hidden_size, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(cfg.hidden_size, 3 * cfg.hidden_size), "proj": nn.Linear(cfg.hidden_size, cfg.hidden_size)})
        self.mlp = nn.ModuleDict(
            {"linear_fc1": nn.Linear(cfg.hidden_size, cfg.intermediate_size), "linear_fc2": nn.Linear(cfg.intermediate_size, cfg.hidden_size)}
        )
        self.heads = cfg.num_heads

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
        batch, length, dim = x.shape
        qkv = self.attn["qkv"](self.norm1(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        out = attend(q, k, v, bias)
        x = x + self.attn["proj"](out.transpose(1, 2).reshape(batch, length, dim))
        return x + self.mlp["linear_fc2"](F.gelu(self.mlp["linear_fc1"](self.norm2(x)), approximate="tanh"))


class PatchMerger(nn.Module):
    def __init__(self, cfg: VisionConfig, out: int, *, after_shuffle: bool) -> None:
        super().__init__()
        self.width, self.after = cfg.hidden_size * cfg.spatial_merge_size**2, after_shuffle
        self.norm = nn.LayerNorm(self.width if after_shuffle else cfg.hidden_size, eps=1e-6)
        self.linear_fc1, self.linear_fc2 = nn.Linear(self.width, self.width), nn.Linear(self.width, out)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, self.width)
        x = self.norm(x) if self.after else self.norm(x.view(-1, self.norm.normalized_shape[0])).view(-1, self.width)
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))


class VisionModel(nn.Module):
    def __init__(self, cfg: VisionConfig, out: int) -> None:
        super().__init__()
        self.cfg = cfg
        proj = nn.Conv3d(cfg.in_channels, cfg.hidden_size, (cfg.temporal_patch_size, cfg.patch_size, cfg.patch_size))
        self.patch_embed = nn.ModuleDict({"proj": proj})  # applied as a matrix product; a convolution in name and shape
        self.pos_embed = nn.Embedding(cfg.num_position_embeddings, cfg.hidden_size)
        self.blocks = nn.ModuleList(VisionBlock(cfg) for _ in range(cfg.depth))
        self.merger = PatchMerger(cfg, out, after_shuffle=False)
        self.deepstack_merger_list = nn.ModuleList(PatchMerger(cfg, out, after_shuffle=True) for _ in cfg.deepstack_visual_indexes)

    def grids(self, sizes: list[tuple[int, int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Row, column and interpolated position embedding of every patch, in merge-block order, padded to `pad`."""
        side, merge = int(self.cfg.num_position_embeddings**0.5), self.cfg.spatial_merge_size
        coords, embeds = [], []
        for height, width in sizes:
            grid = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), dim=-1)
            fine = torch.stack(
                torch.meshgrid(torch.linspace(0, side - 1, height), torch.linspace(0, side - 1, width), indexing="ij"), dim=-1
            )
            both = torch.cat((grid.float(), fine), dim=-1)
            both = both.view(height // merge, merge, width // merge, merge, 4).transpose(1, 2).reshape(-1, 4)
            coords.append(F.pad(both[:, :2], (0, 0, 0, pad - len(both))))
            embeds.append(F.pad(both[:, 2:], (0, 0, 0, pad - len(both))))
        where, fine = torch.stack(coords).to(device), torch.stack(embeds).to(device)
        low = fine.floor().long()
        high, part = (low + 1).clamp(max=side - 1), fine - low
        table = self.pos_embed
        embed = (
            table(low[..., 0] * side + low[..., 1]) * ((1 - part[..., 0]) * (1 - part[..., 1]))[..., None]
            + table(low[..., 0] * side + high[..., 1]) * ((1 - part[..., 0]) * part[..., 1])[..., None]
            + table(high[..., 0] * side + low[..., 1]) * (part[..., 0] * (1 - part[..., 1]))[..., None]
            + table(high[..., 0] * side + high[..., 1]) * (part[..., 0] * part[..., 1])[..., None]
        )
        quarter = self.cfg.hidden_size // self.cfg.num_heads // 4
        inv_freq = 1.0 / 10000.0 ** (torch.arange(quarter, device=device).float() / quarter)
        angles = (where[..., None] * inv_freq).flatten(-2)
        return embed, torch.cat((angles, angles), dim=-1)[:, None], where

    def forward(self, patches: Tensor, sizes: list[tuple[int, int]]) -> tuple[Tensor, list[Tensor]]:
        """`patches` is [images, pad, 3*16*16] -> features of all merged tokens, images joined, and the deepstack features."""
        count = torch.tensor([h * w for h, w in sizes], device=patches.device)
        valid = torch.arange(patches.shape[1], device=patches.device)[None] < count[:, None]
        embed, angles, _ = self.grids(sizes, patches.shape[1], patches.device)
        cos, sin = angles.cos(), angles.sin()
        bias = torch.zeros(valid.shape, device=patches.device).masked_fill(~valid, -torch.inf)[:, None, None]
        conv = self.patch_embed["proj"]
        x = F.linear(patches, conv.weight.sum(2).flatten(1), conv.bias) + embed  # both frames are the same picture
        deep = []
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, bias)
            if i in self.cfg.deepstack_visual_indexes:
                deep.append(self.deepstack_merger_list[len(deep)](x[valid]))
        return self.merger(x[valid]), deep


class DemoModel(nn.Module):
    def __init__(self, cfg: DemoConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.model = nn.ModuleDict({"language_model": TextModel(cfg), "visual": VisionModel(cfg.vision, cfg.hidden_size)})
        for name, weight in self.named_parameters():
            if name.endswith("embed_tokens.weight") or "pos_embed" in name:
                nn.init.normal_(weight, std=0.02)
            elif weight.ndim > 1:
                nn.init.normal_(weight, std=(weight[0].numel()) ** -0.5 * 0.6)
                if name.endswith(("down_proj.weight", "attn.proj.weight", "mlp.linear_fc2.weight")):
                    nn.init.zeros_(weight)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        targets: Tensor,
        weights: Tensor,
        images: tuple[Tensor, list[tuple[int, int]], Tensor] | None = None,
    ) -> Tensor:
        """Weighted mean cross-entropy of `targets` [batch, length]; `images` is (patches, grid sizes, image-token mask)."""
        hidden = self.hidden(ids, positions, images)
        keep = weights > 0
        logits = F.linear(hidden[keep], self.model["language_model"].embed_tokens.weight)
        loss = F.cross_entropy(logits.float(), targets[keep], reduction="none")
        return (loss * weights[keep]).sum() / weights.sum()

    def hidden(self, ids: Tensor, positions: Tensor, images: tuple[Tensor, list[tuple[int, int]], Tensor] | None = None) -> Tensor:
        text = self.model["language_model"]
        x = text.embed_tokens(ids)
        if images is None:
            return text(x, positions, None, [])
        patches, sizes, mask = images
        features, deep = self.model["visual"](patches, sizes)
        x = x.index_put((mask,), features.to(x.dtype))
        return text(x, positions, mask, deep)
