"""GPT-2 as a plain `nn.Module` that knows nothing of meshes.

After "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019), with the parameter names
of OpenAI's and Hugging Face's code below `transformer.`; theirs keep each weight transposed.

Names carry dims: B batch, S sequence, D width, H heads, d a head's width, F feed-forward width, V vocabulary,
T positions.
"""

import math

import attrs
import torch
import torch.nn.functional as F
from torch import nn

INIT_STD = 0.02


@attrs.frozen(kw_only=True)
class GPT2Config:
    """The sizes of one GPT-2; the defaults are those that all of them share."""

    dim: int
    n_layers: int
    n_heads: int
    vocab_size: int = 50257
    max_seq_len: int = 1024
    dropout: float = 0.1
    """Of embeddings, attention probabilities and residual branches, in training."""
    norm_eps: float = 1e-5
    head_dim: int = attrs.field(default=attrs.Factory(lambda self: self.dim // self.n_heads, takes_self=True))
    ffn_dim: int = attrs.field(default=attrs.Factory(lambda self: 4 * self.dim, takes_self=True))


class Linear(nn.Linear):
    """A product and a bias; the weight is drawn from N(0, std^2), the bias starts at zero."""

    def __init__(self, d_in: int, d_out: int, std: float = INIT_STD) -> None:
        self.std = std  # read by reset_parameters, which the next line calls
        super().__init__(d_in, d_out)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """A table of rows drawn from N(0, INIT_STD^2)."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=INIT_STD)


class Attention(nn.Module):
    """Causal self-attention; one product makes queries, keys and values.

    The number of heads is read off that product's output, so a rank may hold only some of them.
    """

    def __init__(self, config: GPT2Config, out_std: float) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        inner = config.n_heads * config.head_dim
        self.c_attn = Linear(config.dim, 3 * inner)
        self.c_proj = Linear(inner, config.dim, out_std)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        B, S, _ = x_BSD.shape
        q_BHSd, k_BHSd, v_BHSd = (
            part.view(B, S, -1, self.head_dim).transpose(1, 2) for part in self.c_attn(x_BSD).chunk(3, dim=-1)
        )
        dropout_p = self.dropout if self.training else 0.0
        o_BHSd = F.scaled_dot_product_attention(q_BHSd, k_BHSd, v_BHSd, dropout_p=dropout_p, is_causal=True)
        return self.resid_dropout(self.c_proj(o_BHSd.transpose(1, 2).reshape(B, S, -1)))


class FeedForward(nn.Module):
    """c_proj(gelu(c_fc x)), with GELU's approximation by tanh."""

    def __init__(self, config: GPT2Config, out_std: float) -> None:
        super().__init__()
        self.c_fc = Linear(config.dim, config.ffn_dim)
        self.c_proj = Linear(config.ffn_dim, config.dim, out_std)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x_BSD), approximate="tanh")))


class Block(nn.Module):
    """One layer: attention and feed-forward, each on a normed copy and added back."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        out_std = INIT_STD / math.sqrt(2 * config.n_layers)
        self.ln_1 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.attn = Attention(config, out_std)
        self.ln_2 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.mlp = FeedForward(config, out_std)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        h_BSD = x_BSD + self.attn(self.ln_1(x_BSD))
        return h_BSD + self.mlp(self.ln_2(h_BSD))


class GPT2(nn.Module):
    """Tokens in, logits out; the head is the transposed embedding."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.wte = Embedding(config.vocab_size, config.dim)
        self.wpe = Embedding(config.max_seq_len, config.dim)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_f = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits [B, S, V] for tokens [B, S].

        `positions` [S] are the tokens' places in the sequence, 0 to S-1 where not given.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        h_BSD = self.drop(self.wte(tokens) + self.wpe(positions))
        for block in self.h:
            h_BSD = block(h_BSD)
        return self.lm_head(self.ln_f(h_BSD))
