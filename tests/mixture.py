"""Small mixtures of experts: three ways to write the stacked experts, and a table for all of them."""

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shardspec as ss


class Looped(nn.Module):
    """A loop over the experts that were hit, as transformers writes it."""

    def __init__(self, n_experts: int, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.num_experts = n_experts
        self.gate_up_proj = nn.Parameter(torch.empty(n_experts, 2 * ffn_dim, dim))
        self.down_proj = nn.Parameter(torch.empty(n_experts, dim, ffn_dim))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, hidden_ND: Tensor, ids_Nk: Tensor, weights_Nk: Tensor) -> Tensor:
        out_ND = torch.zeros_like(hidden_ND)
        with torch.no_grad():
            mask_EkN = F.one_hot(ids_Nk, num_classes=self.num_experts).permute(2, 1, 0)
            hit = torch.greater(mask_EkN.sum(dim=(-1, -2)), 0).nonzero()
        for expert in hit:
            index = expert[0]
            choice, token = torch.where(mask_EkN[index])
            gate, up = F.linear(hidden_ND[token], self.gate_up_proj[index]).chunk(2, dim=-1)
            made = F.linear(F.silu(gate) * up, self.down_proj[index]) * weights_Nk[token, choice, None]
            out_ND.index_add_(0, token, made.to(out_ND.dtype))
        return out_ND


class Plain(nn.Module):
    """A loop over all experts, with masks."""

    def __init__(self, n_experts: int, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(n_experts, ffn_dim, dim))
        self.w2 = nn.Parameter(torch.empty(n_experts, dim, ffn_dim))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, hidden_ND: Tensor, ids_Nk: Tensor, weights_Nk: Tensor) -> Tensor:
        out_ND = torch.zeros_like(hidden_ND)
        for index in range(self.w1.shape[0]):
            share_N1 = (weights_Nk * (ids_Nk == index)).sum(-1, keepdim=True)
            out_ND = out_ND + F.linear(F.gelu(F.linear(hidden_ND, self.w1[index])), self.w2[index]) * share_N1
        return out_ND


class Grouped(nn.Module):
    """One grouped product of the rows, sorted by expert, in float32; its rows and numbers are found by masks."""

    def __init__(self, n_experts: int, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(n_experts, 2 * ffn_dim, dim))
        self.down_proj = nn.Parameter(torch.empty(n_experts, dim, ffn_dim))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, hidden_ND: Tensor, ids_Nk: Tensor, weights_Nk: Tensor) -> Tensor:
        order = ids_Nk.flatten().argsort(stable=True)
        token = order // ids_Nk.shape[1]
        ends_E = torch.bincount(ids_Nk.flatten(), minlength=self.down_proj.shape[0]).cumsum(0).to(torch.int32)
        up = F.grouped_mm(hidden_ND[token].float(), self.gate_up_proj.float().transpose(-2, -1), offs=ends_E)
        gate, up = up.chunk(2, dim=-1)
        made = F.grouped_mm(F.silu(gate) * up, self.down_proj.float().transpose(-2, -1), offs=ends_E)
        made = made * weights_Nk.flatten()[order, None]
        return torch.zeros_like(hidden_ND).index_add_(0, token, made.to(hidden_ND.dtype))


class Masked(Plain):
    """A loop over all experts that picks rows by masks."""

    def forward(self, hidden_ND: Tensor, ids_Nk: Tensor, weights_Nk: Tensor) -> Tensor:
        out_ND = torch.zeros_like(hidden_ND)
        for index in range(self.w1.shape[0]):
            token, choice = torch.where(ids_Nk == index)
            made = F.linear(F.gelu(F.linear(hidden_ND[(ids_Nk == index).any(1)], self.w1[index])), self.w2[index])
            out_ND = out_ND.index_add(0, token, made * weights_Nk[token, choice, None])
        return out_ND


class Moe(nn.Module):
    """Softmax scores, the best k of them, made to sum to one."""

    def __init__(self, experts: nn.Module, n_experts: int, dim: int, bias: tuple[float, ...], flat: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, n_experts, bias=False)
        nn.init.normal_(self.gate.weight, std=0.0 if flat else 1.0)
        self.experts = experts
        self.capacity = 0
        """The most assignments that an expert takes; set on the plain program, where no runtime drops the rest."""
        self.register_buffer("bias", torch.tensor(bias or (0.0,) * n_experts))

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_ND = x_BSD.reshape(-1, x_BSD.shape[-1])
        scores_NE = F.softmax(self.gate(x_ND), dim=-1)
        _, ids_Nk = torch.topk(scores_NE + self.bias, 2, dim=-1)
        weights_Nk = scores_NE.gather(1, ids_Nk)
        weights_Nk = weights_Nk / weights_Nk.sum(-1, keepdim=True)
        if self.capacity:
            weights_Nk = weights_Nk * kept(ids_Nk, self.capacity)
        return self.experts(x_ND, ids_Nk, weights_Nk).view_as(x_BSD)


def kept(ids_Nk: Tensor, capacity: int) -> Tensor:
    """1 for the assignments that are among the first `capacity` of their expert, else 0."""
    taken: dict[int, int] = {}
    found = torch.zeros(ids_Nk.shape, dtype=torch.get_default_dtype())
    for token, chosen in enumerate(ids_Nk.tolist()):
        for choice, expert in enumerate(chosen):
            found[token, choice] = taken.get(expert, 0) < capacity
            taken[expert] = taken.get(expert, 0) + 1
    return found


class Layer(nn.Module):
    def __init__(self, moe: Moe, dim: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim)
        self.moe = moe

    def forward(self, x_BSD: Tensor) -> Tensor:
        return x_BSD + self.moe(self.norm(x_BSD))


class Mixture(nn.Module):
    """Embedding, layers of experts, head."""

    def __init__(self, config: "Config") -> None:
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList()
        for _ in range(config.n_layers):
            experts = config.kind(config.n_experts, config.dim, config.ffn_dim)
            moe = Moe(experts, config.n_experts, config.dim, config.bias, config.flat)
            self.layers.append(Layer(moe, config.dim))
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x_BSD = self.embed(tokens)
        for layer in self.layers:
            x_BSD = layer(x_BSD)
        return self.head(x_BSD)


@attrs.frozen(kw_only=True)
class Config:
    """Sizes, and how tokens choose."""

    kind: type[nn.Module] = Looped
    n_experts: int = 4
    n_layers: int = 2
    dim: int = 8
    ffn_dim: int = 12
    vocab_size: int = 40
    bias: tuple[float, ...] = ()
    """Added to the scores when experts are chosen: large numbers send every token to the same ones."""
    flat: bool = False
    """Whether the router's weights are zero, so that all scores are alike."""


RULES = ss.Rules(
    params={
        r"embed\.weight": "V D@(fsdp,ep)",
        r"layers\.\d+\.norm\.weight": "D@(fsdp,ep)",
        r"layers\.\d+\.moe\.gate\.weight": "E D@(fsdp,ep)",
        r"layers\.\d+\.moe\.bias": "E",
        r"layers\.\d+\.moe\.experts\.gate_up_proj": "E@(ep,fsdp) (2 F@tp) D",
        r"layers\.\d+\.moe\.experts\.down_proj": "E@(ep,fsdp) D F@tp",
        r"head\.weight": "V D@(fsdp,ep)",
    },
    activations={
        r"tokens|labels": "B@(dp,fsdp,ep) S",
        r"layers\.\d+\.moe": "B@(dp,fsdp,ep) S D",
    },
    units=[r"layers\.\d+"],
    pipeline=r"layers\.(?P<pp>\d+)",
    experts=r"layers\.\d+\.moe\.experts",
)

PLAIN_RULES = RULES.override(
    drop=[r"layers\.\d+\.moe\.experts\.gate_up_proj", r"layers\.\d+\.moe\.experts\.down_proj"],
    params={
        r"layers\.\d+\.moe\.experts\.w1": "E@ep F@(tp,fsdp) D",
        r"layers\.\d+\.moe\.experts\.w2": "E@ep D@fsdp F@tp",
    },
)
"""The same with storage on other dims than the experts'."""

SEQUENCE_RULES = RULES.override(
    activations={r"tokens|labels": "B S@(dp,fsdp,ep)", r"layers\.\d+\.moe": "B S@(dp,fsdp,ep) D"}
)
"""The same with every row of the batch split: a rank's tokens are not consecutive."""


def make_batch(step: int = 0) -> dict[str, Tensor]:
    """A global batch [16, 8] whose masked labels differ from row to row."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(0, 40, (16, 8), generator=generator)
    labels = torch.randint(0, 40, (16, 8), generator=generator)
    masked = torch.rand(16, 8, generator=generator) < torch.linspace(0, 1, 16)[:, None]
    return {"tokens": tokens, "labels": labels.masked_fill(masked, -100)}


def loss_fn(output: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The summed cross-entropy and the number of labels that count."""
    return ss.cross_entropy(output, batch["labels"])
