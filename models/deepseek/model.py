"""DeepSeek-V3 as a plain `nn.Module` that knows nothing of meshes, without its extra prediction module.

After "DeepSeek-V3 Technical Report" (arXiv 2412.19437): latent attention (MLA), a dense feed-forward in the first
layers, and in the others experts that all tokens share beside those that each token chooses. The choice is kept in
balance by a bias and not by a loss. The rotary form is Llama's here (a head's two halves turn together; the published
weights turn even and odd entries: rows of wq_b and wkv_a differ by a permutation).

Names carry dims: B batch, S sequence, D width, N = B S tokens, H heads, Q and C the widths of the queries' and the
key-values' latents, n, r and v a head's parts without positions, with them, and of values, E experts, G groups, k
choices, T positions.
"""

import math

import attrs
import torch
import torch.nn.functional as F
from torch import nn

from models.experts import Experts
from models.llama.model import INIT_STD, Embedding, FeedForward, Linear, rotate


@attrs.frozen(kw_only=True)
class DeepSeekConfig:
    """The sizes of one DeepSeek; the defaults are those of V3."""

    dim: int
    n_layers: int
    n_dense_layers: int
    n_heads: int
    q_rank: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    ffn_dim: int
    """Of a dense layer."""
    moe_dim: int
    """Of one expert."""
    n_experts: int
    top_k: int
    n_groups: int
    top_groups: int
    n_shared: int = 1
    route_scale: float = 2.5
    vocab_size: int = 129280
    max_seq_len: int = 4096
    rope_theta: float = 10000.0
    rope_factor: float = 1.0
    """By how much positions outgrow those of pretraining: YaRN's s, 1 for none."""
    rope_trained: int = 4096
    """The positions of pretraining."""
    norm_eps: float = 1e-6


class Attention(nn.Module):
    """Multi-head latent attention (section 2.1.1): queries, and keys with values, each out of a low-rank latent.

    Positions turn a part of each query head, and one key part that all heads share. The number of heads is read off
    the projections' outputs, so a rank may hold only some of them.
    """

    def __init__(self, config: DeepSeekConfig, out_std: float) -> None:
        super().__init__()
        self.kv_rank, self.nope_dim, self.rope_dim, self.v_dim = (
            config.kv_rank, config.nope_dim, config.rope_dim, config.v_dim,
        )  # fmt: skip
        # YaRN's temperature (arXiv 2309.00071, eq. 23), squared for queries and keys.
        temperature = 0.1 * math.log(config.rope_factor) + 1
        self.scale = (config.nope_dim + config.rope_dim) ** -0.5 * temperature**2
        self.wq_a = Linear(config.dim, config.q_rank)
        self.q_norm = nn.RMSNorm(config.q_rank, eps=config.norm_eps)
        self.wq_b = Linear(config.q_rank, config.n_heads * (config.nope_dim + config.rope_dim))
        self.wkv_a = Linear(config.dim, config.kv_rank + config.rope_dim)
        self.kv_norm = nn.RMSNorm(config.kv_rank, eps=config.norm_eps)
        self.wkv_b = Linear(config.kv_rank, config.n_heads * (config.nope_dim + config.v_dim))
        self.wo = Linear(config.n_heads * config.v_dim, config.dim, out_std)

    def forward(self, x_BSD: torch.Tensor, cos_S1r: torch.Tensor, sin_S1r: torch.Tensor) -> torch.Tensor:
        B, S, _ = x_BSD.shape
        q_BSHx = self.wq_b(self.q_norm(self.wq_a(x_BSD))).view(B, S, -1, self.nope_dim + self.rope_dim)
        q_BSHn, q_BSHr = q_BSHx.split((self.nope_dim, self.rope_dim), dim=-1)
        latent_BSC, k_BSr = self.wkv_a(x_BSD).split((self.kv_rank, self.rope_dim), dim=-1)
        kv_BSHx = self.wkv_b(self.kv_norm(latent_BSC)).view(B, S, -1, self.nope_dim + self.v_dim)
        k_BSHn, v_BSHv = kv_BSHx.split((self.nope_dim, self.v_dim), dim=-1)
        k_BS1r = rotate(k_BSr.unsqueeze(2), cos_S1r, sin_S1r)
        q_BSHx = torch.cat((q_BSHn, rotate(q_BSHr, cos_S1r, sin_S1r)), dim=-1)
        k_BSHx = torch.cat((k_BSHn, k_BS1r.expand(-1, -1, k_BSHn.shape[2], -1)), dim=-1)
        o_BHSv = F.scaled_dot_product_attention(
            q_BSHx.transpose(1, 2),
            k_BSHx.transpose(1, 2),
            v_BSHv.transpose(1, 2),
            is_causal=True,
            scale=self.scale,
        )
        return self.wo(o_BHSv.transpose(1, 2).reshape(B, S, -1))


class Router(nn.Module):
    """Which experts a token goes to, limited to some groups of them, and how they are weighted (section 2.1.2).

    `bias` sways the choice alone, and no gradient reaches it: `balanced` moves it between steps, by the choices that
    `counts` has added up. A microbatch's go through `load`, which computes nothing: a table says of it that it is whole
    on every rank.
    """

    def __init__(self, config: DeepSeekConfig) -> None:
        super().__init__()
        self.top_k, self.n_groups, self.top_groups = config.top_k, config.n_groups, config.top_groups
        self.route_scale = config.route_scale
        self.gate = Linear(config.dim, config.n_experts)
        self.load = nn.Identity()
        self.register_buffer("bias", torch.zeros(config.n_experts))
        self.register_buffer("counts", torch.zeros(config.n_experts, dtype=torch.long))

    def forward(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids [N, k] and weights [N, k] that sum to `route_scale`."""
        scores_NE = wide(self.gate(x_ND)).sigmoid()
        ids_Nk = self.choose(scores_NE.detach() + self.bias)
        load_E = self.load(F.one_hot(ids_Nk, scores_NE.shape[1]).sum((0, 1)))
        if self.training:
            self.counts.add_(load_E)
        weights_Nk = scores_NE.gather(1, ids_Nk)
        weights_Nk = weights_Nk / weights_Nk.sum(-1, keepdim=True) * self.route_scale
        return ids_Nk, weights_Nk.to(x_ND.dtype)

    def choose(self, scores_NE: torch.Tensor) -> torch.Tensor:
        """Return the ids [N, k] of the highest scores in the groups whose two highest have the highest sums."""
        scores_NGe = scores_NE.unflatten(1, (self.n_groups, -1))
        sums_NG = scores_NGe.topk(2, dim=-1).values.sum(-1)
        groups_Ng = sums_NG.topk(self.top_groups, dim=-1).indices
        open_NG = F.one_hot(groups_Ng, self.n_groups).sum(1) > 0
        return scores_NGe.masked_fill(~open_NG.unsqueeze(2), -torch.inf).flatten(1).topk(self.top_k, dim=-1).indices


class MoE(nn.Module):
    """The experts that a router chooses, and those that all tokens share."""

    def __init__(self, config: DeepSeekConfig, out_std: float) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config.n_experts, config.dim, config.moe_dim, INIT_STD, out_std)
        self.shared = FeedForward(attrs.evolve(config, ffn_dim=config.n_shared * config.moe_dim), out_std)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        x_ND = x_BSD.flatten(0, 1)
        ids_Nk, weights_Nk = self.router(x_ND)
        return self.experts(x_ND, ids_Nk, weights_Nk).view_as(x_BSD) + self.shared(x_BSD)


class Block(nn.Module):
    """One layer: attention, then a dense feed-forward or experts, each on a normed copy and added back."""

    def __init__(self, config: DeepSeekConfig, *, dense: bool) -> None:
        super().__init__()
        out_std = INIT_STD / math.sqrt(2 * config.n_layers)
        self.attention = Attention(config, out_std)
        if dense:
            self.feed_forward = FeedForward(config, out_std)
        else:
            self.moe = MoE(config, out_std)
        self.dense = dense
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)

    def forward(self, x_BSD: torch.Tensor, cos_S1r: torch.Tensor, sin_S1r: torch.Tensor) -> torch.Tensor:
        h_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), cos_S1r, sin_S1r)
        feed_forward = self.feed_forward if self.dense else self.moe
        return h_BSD + feed_forward(self.ffn_norm(h_BSD))


class DeepSeek(nn.Module):
    """Tokens in, logits out."""

    def __init__(self, config: DeepSeekConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(
            Block(config, dense=index < config.n_dense_layers) for index in range(config.n_layers)
        )
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.output = Linear(config.dim, config.vocab_size)
        angles_Tr = rope_angles(config)
        self.register_buffer("rope_cos", angles_Tr.cos(), persistent=False)
        self.register_buffer("rope_sin", angles_Tr.sin(), persistent=False)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits [B, S, V] for tokens [B, S].

        `positions` [S] are the tokens' places in the sequence, 0 to S-1 where not given.
        """
        h_BSD = self.tok_embeddings(tokens)
        rows = slice(tokens.shape[1]) if positions is None else positions
        cos_S1r = self.rope_cos[rows].unsqueeze(1).to(h_BSD.dtype)
        sin_S1r = self.rope_sin[rows].unsqueeze(1).to(h_BSD.dtype)
        for layer in self.layers:
            h_BSD = layer(h_BSD, cos_S1r, sin_S1r)
        return self.output(self.norm(h_BSD))


def rope_angles(config: DeepSeekConfig) -> torch.Tensor:
    """Return the rotary angles [T, rope_dim] in radians, both halves alike.

    With a `rope_factor` s above 1 they are YaRN's (arXiv 2309.00071, section 3.2, by the index of the frequency): one
    that turns fewer than once in the positions of pretraining is divided by s, one that turns more than 32 times is
    kept, and those between blend.
    """
    count = config.rope_dim // 2
    freq_h = config.rope_theta ** (-torch.arange(count).float() / count)

    def index_of(turns: float) -> float:
        """The index, a fraction, of the frequency that turns so often in pretraining."""
        return count * math.log(config.rope_trained / (turns * 2 * math.pi)) / math.log(config.rope_theta)

    if config.rope_factor > 1:
        first, last = max(math.floor(index_of(32)), 0), min(math.ceil(index_of(1)), config.rope_dim - 1)
        divided_h = ((torch.arange(count).float() - first) / max(last - first, 1e-3)).clamp(0, 1)
        freq_h = freq_h * (1 - divided_h + divided_h / config.rope_factor)
    angles_Th = torch.outer(torch.arange(config.max_seq_len).float(), freq_h)
    return torch.cat((angles_Th, angles_Th), dim=-1)


def wide(x: torch.Tensor) -> torch.Tensor:
    """Return `x` in float32, or in float64 where it is: what a router computes in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
