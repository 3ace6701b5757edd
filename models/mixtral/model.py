"""Mixtral as a plain `nn.Module` that knows nothing of meshes.

After "Mixtral of Experts" (arXiv 2401.04088), with Llama's attention. Each token goes to the `top_k` experts of the
highest probability, no token is dropped, and two small losses keep the router in balance and its logits small.

Names carry dims: B batch, S sequence, D width, N = B S tokens, E experts, k choices of a token, T positions, d a head's
width.
"""

import math

import attrs
import torch
import torch.nn.functional as F
from torch import nn

from models.experts import Experts
from models.llama.model import INIT_STD, Attention, Embedding, Linear, rope_angles


@attrs.frozen(kw_only=True)
class MixtralConfig:
    """The sizes of one Mixtral; the defaults are those of 8x7B."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    """Of one expert."""
    n_experts: int = 8
    top_k: int = 2
    vocab_size: int = 32000
    max_seq_len: int = 32768
    rope_theta: float = 1000000.0
    rope_scale: float = 1.0
    norm_eps: float = 1e-5
    balance_coef: float = 0.02
    z_coef: float = 0.001
    head_dim: int = attrs.field(default=attrs.Factory(lambda self: self.dim // self.n_heads, takes_self=True))


class Router(nn.Module):
    """Which experts a token goes to, how they are weighted, and what the batch's routing costs.

    What the two losses read is a mean over all tokens of the microbatch. It goes through `load`, which computes
    nothing: a table says of it that it is whole on every rank.
    """

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        self.top_k, self.balance_coef, self.z_coef = config.top_k, config.balance_coef, config.z_coef
        self.gate = Linear(config.dim, config.n_experts)
        self.load = nn.Identity()

    def forward(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return ids [N, k], weights [N, k] that sum to one, and the loss of the routing, a scalar.

        The loss is `balance_coef` times E sum_e f_e P_e, where expert e has the share f_e of the choices and the mean
        probability P_e (arXiv 2101.03961, eq. 4): 1 where all are alike. And `z_coef` times the mean of
        logsumexp(logits)^2 (arXiv 2202.08906, eq. 5).
        """
        logits_NE = wide(self.gate(x_ND))
        probs_NE = logits_NE.softmax(-1)
        weights_Nk, ids_Nk = probs_NE.topk(self.top_k, dim=-1)
        weights_Nk = weights_Nk / weights_Nk.sum(-1, keepdim=True)
        experts = logits_NE.shape[1]
        chosen_NE = F.one_hot(ids_Nk, experts).sum(1).to(probs_NE.dtype) / self.top_k
        z_N1 = logits_NE.logsumexp(-1, keepdim=True).square()
        load = self.load(torch.cat((chosen_NE, probs_NE, z_N1), dim=1).mean(0))
        share_E, mean_E, z_1 = load.split((experts, experts, 1))
        loss = self.balance_coef * experts * (share_E * mean_E).sum() + self.z_coef * z_1.sum()
        return ids_Nk, weights_Nk.to(x_ND.dtype), loss


class MoE(nn.Module):
    """A router and the experts that it chooses from."""

    def __init__(self, config: MixtralConfig, out_std: float) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config.n_experts, config.dim, config.ffn_dim, INIT_STD, out_std)

    def forward(self, x_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return [B, S, D] and the loss of the routing."""
        x_ND = x_BSD.flatten(0, 1)
        ids_Nk, weights_Nk, loss = self.router(x_ND)
        return self.experts(x_ND, ids_Nk, weights_Nk).view_as(x_BSD), loss


class Block(nn.Module):
    """One layer: attention and experts, each on a normed copy and added back; the losses add up beside them."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        out_std = INIT_STD / math.sqrt(2 * config.n_layers)
        self.attention = Attention(config, out_std)
        self.moe = MoE(config, out_std)
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)

    def forward(
        self, x_BSD: torch.Tensor, aux: torch.Tensor, cos_S1d: torch.Tensor, sin_S1d: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        h_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), cos_S1d, sin_S1d)
        y_BSD, loss = self.moe(self.ffn_norm(h_BSD))
        return h_BSD + y_BSD, aux + loss


class Mixtral(nn.Module):
    """Tokens in, logits and the losses of the routing out."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.output = Linear(config.dim, config.vocab_size)
        angles_Td = rope_angles(config)
        self.register_buffer("rope_cos", angles_Td.cos(), persistent=False)
        self.register_buffer("rope_sin", angles_Td.sin(), persistent=False)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits [B, S, V] for tokens [B, S], and the mean over layers of the routers' losses, a scalar.

        `positions` [S] are the tokens' places in the sequence, 0 to S-1 where not given.
        """
        h_BSD = self.tok_embeddings(tokens)
        rows = slice(tokens.shape[1]) if positions is None else positions
        cos_S1d = self.rope_cos[rows].unsqueeze(1).to(h_BSD.dtype)
        sin_S1d = self.rope_sin[rows].unsqueeze(1).to(h_BSD.dtype)
        aux = torch.zeros((), dtype=wide_dtype(h_BSD.dtype), device=h_BSD.device)
        for layer in self.layers:
            h_BSD, aux = layer(h_BSD, aux, cos_S1d, sin_S1d)
        return self.output(self.norm(h_BSD)), aux / len(self.layers)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a router computes in: float32, or float64 where the model does."""
    return torch.promote_types(dtype, torch.float32)


def wide(x: torch.Tensor) -> torch.Tensor:
    """Return `x` in float32, or in float64 where it is."""
    return x.to(wide_dtype(x.dtype))
