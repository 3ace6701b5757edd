"""A Llama with one projection for queries, keys and values, and one for gate and up, with biases; its table."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shardspec as ss
from models.llama.model import Llama, LlamaConfig, rotate
from models.llama.rules import RULES as LLAMA
from models.llama.rules import WITHOUT_SP as LLAMA_WITHOUT_SP

CONFIG = LlamaConfig(
    dim=18, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=4, ffn_dim=24, vocab_size=40, max_seq_len=32, tied=False
)
"""A rank of tp=2 holds 12 + 4 + 4 rows of a fused projection: its halves over fsdp=2 end within a part."""


class FusedAttention(nn.Module):
    """Attention whose projections are one; the numbers of heads are attributes, that a rank's own may be put there."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.wqkv = nn.Linear(config.dim, (config.n_heads + 2 * config.n_kv_heads) * config.head_dim)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)

    def cut(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """[B, S, (H + 2 K) hd] -> queries, keys, values [B, S, heads, hd]."""
        wide, narrow = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        parts = qkv.split([wide, narrow, narrow], dim=-1)
        return tuple(part.view(*part.shape[:2], -1, self.head_dim) for part in parts)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.cut(self.wqkv(x))
        q, k, v = rotate(q, cos, sin).transpose(1, 2), rotate(k, cos, sin).transpose(1, 2), v.transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(out.transpose(1, 2).reshape(*x.shape[:2], -1))


class SlicedAttention(FusedAttention):
    """The same, cut by slices."""

    def cut(self, qkv: Tensor) -> tuple[Tensor, ...]:
        wide, narrow = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        parts = qkv[..., :wide], qkv[..., wide : wide + narrow], qkv[..., wide + narrow :]
        return tuple(part.unflatten(-1, (-1, self.head_dim)) for part in parts)


class HeadsAttention(FusedAttention):
    """The same, cut into heads before it is cut into parts."""

    def cut(self, qkv: Tensor) -> tuple[Tensor, ...]:
        heads = qkv.view(*qkv.shape[:2], -1, self.head_dim)
        return heads.split([self.n_heads, self.n_kv_heads, self.n_kv_heads], dim=2)


class SizedAttention(FusedAttention):
    """The same, with the lengths of the parts for attributes."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.wide, self.narrow = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.length = self.wide + 2 * self.narrow

    def cut(self, qkv: Tensor) -> tuple[Tensor, ...]:
        parts = qkv.view(*qkv.shape[:2], self.length).split([self.wide, self.narrow, self.narrow], dim=-1)
        return tuple(part.view(*part.shape[:2], -1, self.head_dim) for part in parts)


class NamedAttention(FusedAttention):
    """The same, with names where a table may change how the packed product lies."""

    def cut(self, qkv: Tensor) -> tuple[Tensor, ...]:
        return super().cut(ss.name(ss.name(qkv, "qkv") * 1.0, "again"))


class FlattenedAttention(FusedAttention):
    """The same, with a view on the way that merges the packed dim with the sequence."""

    def cut(self, qkv: Tensor) -> tuple[Tensor, ...]:
        return super().cut(qkv.flatten(1).view(qkv.shape))


class WrittenAttention(FusedAttention):
    """The same with its sizes written down."""

    def cut(self, qkv: Tensor) -> tuple[Tensor, ...]:
        parts = qkv.split([24, 8, 8], dim=-1)
        return tuple(part.view(*part.shape[:2], -1, 4) for part in parts)


class FusedFeedForward(nn.Module):
    """SwiGLU with one projection for gate and up."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.w13 = nn.Linear(config.dim, 2 * config.ffn_dim)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


def build(kind: type[FusedAttention] = FusedAttention, config: LlamaConfig = CONFIG) -> nn.Module:
    """The model, its weights large enough for every path to carry gradients."""
    model = Llama(config)
    for layer in model.layers:
        layer.attention, layer.feed_forward = kind(config), FusedFeedForward(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.3)
    return model


QKV = r"layers\.\d+\.attention\.wqkv\.(weight|bias)"
PARAMS = {
    r"layers\.\d+\.attention\.wqkv\.weight": "(H@tp hd + K@tp hd + K@tp hd)@fsdp D",
    r"layers\.\d+\.attention\.wqkv\.bias": "(H@tp hd + K@tp hd + K@tp hd)@fsdp",
    r"layers\.\d+\.feed_forward\.w13\.weight": "(F@tp + F@tp)@fsdp D",
    r"layers\.\d+\.feed_forward\.w13\.bias": "(2 F@tp)@fsdp",
}
UNFUSED = [
    r"layers\.\d+\.attention\.wq\.weight",
    r"layers\.\d+\.attention\.w[kv]\.weight",
    r"layers\.\d+\.feed_forward\.w[13]\.weight",
]
ATTRIBUTES = {r"layers\.\d+\.attention": {"n_heads": "H@tp", "n_kv_heads": "K@tp"}}

RULES = LLAMA.override(params=PARAMS, drop=UNFUSED, attributes=ATTRIBUTES)
WITHOUT_SP = LLAMA_WITHOUT_SP.override(params=PARAMS, drop=UNFUSED, attributes=ATTRIBUTES)
