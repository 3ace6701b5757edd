"""Llama 3 as a plain `nn.Module` that knows nothing of meshes.

After "The Llama 3 Herd of Models" (arXiv 2407.21783), with the parameter names of Meta's reference
code and the rotary form of Hugging Face's (a head's two halves turn together, where Meta's code
turns even and odd entries: the weights of wq and wk differ by a permutation of rows).

Names carry dims: B batch, S sequence, D width, H heads, K key-value heads, d a head's width, F
feed-forward width, V vocabulary, T positions.
"""

import math

import attrs
import torch
import torch.nn.functional as F
from torch import nn

INIT_STD = 0.02


@attrs.frozen(kw_only=True)
class LlamaConfig:
    """The sizes of one Llama; the defaults are those that all of Llama 3 shares."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    vocab_size: int = 128256
    max_seq_len: int = 8192
    rope_theta: float = 500000.0
    rope_scale: float = 1.0
    norm_eps: float = 1e-5
    tied: bool = False
    head_dim: int = attrs.field(default=attrs.Factory(lambda self: self.dim // self.n_heads, takes_self=True))


class Linear(nn.Linear):
    """A product without bias, its weight drawn from N(0, std^2)."""

    def __init__(self, d_in: int, d_out: int, std: float = INIT_STD) -> None:
        self.std = std  # read by reset_parameters, which the next line calls
        super().__init__(d_in, d_out, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)


class Embedding(nn.Embedding):
    """A table of rows drawn from N(0, INIT_STD^2)."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INIT_STD)


class Attention(nn.Module):
    """Causal self-attention with grouped key-value heads and rotary positions.

    The number of heads is read off the projections' outputs, so a rank may hold only some of them.
    """

    def __init__(self, config: LlamaConfig, out_std: float) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_dim = config.n_heads * config.head_dim
        kv_dim = config.n_kv_heads * config.head_dim
        self.wq = Linear(config.dim, q_dim)
        self.wk = Linear(config.dim, kv_dim)
        self.wv = Linear(config.dim, kv_dim)
        self.wo = Linear(q_dim, config.dim, out_std)

    def forward(self, x_BSD: torch.Tensor, cos_S1d: torch.Tensor, sin_S1d: torch.Tensor) -> torch.Tensor:
        B, S, _ = x_BSD.shape
        q_BSHd = rotate(self.wq(x_BSD).view(B, S, -1, self.head_dim), cos_S1d, sin_S1d)
        k_BSKd = rotate(self.wk(x_BSD).view(B, S, -1, self.head_dim), cos_S1d, sin_S1d)
        v_BSKd = self.wv(x_BSD).view(B, S, -1, self.head_dim)
        o_BHSd = F.scaled_dot_product_attention(
            q_BSHd.transpose(1, 2),
            k_BSKd.transpose(1, 2),
            v_BSKd.transpose(1, 2),
            is_causal=True,
            enable_gqa=True,
        )
        return self.wo(o_BHSd.transpose(1, 2).reshape(B, S, -1))


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: LlamaConfig, out_std: float) -> None:
        super().__init__()
        self.w1 = Linear(config.dim, config.ffn_dim)
        self.w2 = Linear(config.ffn_dim, config.dim, out_std)
        self.w3 = Linear(config.dim, config.ffn_dim)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x_BSD)) * self.w3(x_BSD))


class Block(nn.Module):
    """One layer: attention and feed-forward, each on a normed copy and added back."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        out_std = INIT_STD / math.sqrt(2 * config.n_layers)
        self.attention = Attention(config, out_std)
        self.feed_forward = FeedForward(config, out_std)
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)

    def forward(self, x_BSD: torch.Tensor, cos_S1d: torch.Tensor, sin_S1d: torch.Tensor) -> torch.Tensor:
        h_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), cos_S1d, sin_S1d)
        return h_BSD + self.feed_forward(self.ffn_norm(h_BSD))


class Llama(nn.Module):
    """Tokens in, logits out."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.output = Linear(config.dim, config.vocab_size)
        if config.tied:
            self.output.weight = self.tok_embeddings.weight
        angles_Td = rope_angles(config)
        self.register_buffer("rope_cos", angles_Td.cos(), persistent=False)
        self.register_buffer("rope_sin", angles_Td.sin(), persistent=False)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits [B, S, V] for tokens [B, S].

        `positions` [S] are the tokens' places in the sequence, 0 to S-1 where not given.
        """
        h_BSD = self.tok_embeddings(tokens)
        rows = slice(tokens.shape[1]) if positions is None else positions
        cos_S1d = self.rope_cos[rows].unsqueeze(1).to(h_BSD.dtype)
        sin_S1d = self.rope_sin[rows].unsqueeze(1).to(h_BSD.dtype)
        for layer in self.layers:
            h_BSD = layer(h_BSD, cos_S1d, sin_S1d)
        return self.output(self.norm(h_BSD))


def rope_angles(config: LlamaConfig) -> torch.Tensor:
    """Return the rotary angles [T, head_dim] in radians (arXiv 2104.09864), both halves alike.

    A `rope_scale` s above 1 is Llama 3.1's: a frequency that turns fewer than once in the 8192 positions
    of pretraining is divided by s, one that turns more than four times is kept, those between blend.
    """
    freq_h = config.rope_theta ** (-torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    turns_h = freq_h * 8192 / (2 * math.pi)
    keep_h = ((turns_h - 1) / (4 - 1)).clamp(0, 1)
    freq_h = freq_h * (keep_h + (1 - keep_h) / config.rope_scale)
    angles_Th = torch.outer(torch.arange(config.max_seq_len).float(), freq_h)
    return torch.cat((angles_Th, angles_Th), dim=-1)


def rotate(x_BSHd: torch.Tensor, cos_S1d: torch.Tensor, sin_S1d: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x[i], x[i + d/2]) of a head by its position's angle."""
    low, high = x_BSHd.chunk(2, dim=-1)
    return x_BSHd * cos_S1d + torch.cat((-high, low), dim=-1) * sin_S1d
