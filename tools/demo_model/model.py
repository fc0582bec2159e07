"""The demo model in PyTorch, for training only: a compact Qwen3-VL (text decoder, vision tower, deepstack, interleaved M-RoPE).

Parameter names are Hugging Face's, so the state dict needs no renaming when it is shipped.
Text and images arrive packed (see `batches.py`): one row of tokens, one of patches, and where each case or picture begins.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batches import Batch
from .shape import DemoConfig, VisionConfig


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, *, causal: bool) -> Tensor:
    """Attention over packed [tokens, heads, dim], each token within its own case: `starts` as in `Batch`."""
    if q.is_cuda:
        from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415  absent before PyTorch 2.10, and only a GPU needs it

        return varlen_attn(q, k, v, starts, starts, longest, longest, window_size=(-1, 0 if causal else -1))
    owner = torch.bucketize(torch.arange(len(q)), starts[1:], right=True)
    mask = owner[:, None] == owner[None]
    if causal:
        mask = mask.tril()
    out = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], attn_mask=mask)
    return out[0].transpose(0, 1)


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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, starts: Tensor, longest: int) -> Tensor:
        q = self.q_norm(self.q_proj(x).view(len(x), self.heads, -1))
        k = self.k_norm(self.k_proj(x).view(len(x), self.kv_heads, -1))
        v = self.v_proj(x).view(len(x), self.kv_heads, -1)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        return self.o_proj(attend(q, k, v, starts, longest, causal=True).reshape(len(x), -1))


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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, starts: Tensor, longest: int) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, starts, longest)
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

    def forward(self, x: Tensor, batch: Batch, deep: list[Tensor]) -> Tensor:
        """`deep` is added to the image tokens after the first layers."""
        angles = batch.positions[self.axis].T.float() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        cos, sin = angles.cos(), angles.sin()
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, batch.starts, batch.longest)
            if i < len(deep):
                x = x.index_add(0, batch.image_at, deep[i].to(x.dtype))
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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, starts: Tensor) -> Tensor:
        q, k, v = self.attn["qkv"](self.norm1(x)).view(len(x), 3, self.heads, -1).unbind(1)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        x = x + self.attn["proj"](attend(q, k, v, starts, 512, causal=False).reshape(len(x), -1))
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

    def forward(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Features [image tokens, width of the text] of all pictures, and those for the deepstack layers."""
        quarter = self.cfg.hidden_size // self.cfg.num_heads // 4
        inv_freq = 1.0 / 10000.0 ** (torch.arange(quarter, device=batch.where.device).float() / quarter)
        angles = (batch.where[..., None] * inv_freq).flatten(-2)
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        cos, sin = angles.cos(), angles.sin()
        conv = self.patch_embed["proj"]
        pixels = batch.patches.float() / 127.5 - 1
        x = F.linear(pixels, conv.weight.sum(2).flatten(1), conv.bias)  # both frames are the same picture
        x = x + (self.pos_embed(batch.corners) * batch.shares[..., None]).sum(1)
        deep = []
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, batch.image_starts)
            if i in self.cfg.deepstack_visual_indexes:
                deep.append(self.deepstack_merger_list[len(deep)](x))
        return self.merger(x), deep


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

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted mean cross-entropy of the targets; and, of each, its cross-entropy and whether it would be chosen [K]."""
        text = self.model["language_model"]
        features, deep = self.model["visual"](batch)
        x = text.embed_tokens(batch.ids)
        x = x.index_copy(0, batch.image_at, features.to(x.dtype))
        hidden = text(x, batch, deep)[batch.target_at]
        logits = F.linear(hidden, text.embed_tokens.weight).float()
        losses = F.cross_entropy(logits, batch.targets, reduction="none")
        return (losses * batch.weights).sum() / batch.weights.sum(), losses.detach(), logits.argmax(-1) == batch.targets
