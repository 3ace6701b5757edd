"""A small model that reads sequences, with each form of attention that a strategy may meet, and its tables.

B batch, S sequence, D width, H heads, K key-value heads, hd a head's width, T positions, V vocabulary.
"""

from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shardspec as ss


@attrs.frozen(kw_only=True)
class Shape:
    """The sizes of a reader, and how it attends."""

    kind: str = "causal"
    """"causal", "full", "documents" (a boolean mask), "biased" (an additive one) or "padded" (of keys alone)."""
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 4
    value_dim: int = 4
    dim: int = 16
    layers: int = 2
    vocabulary: int = 24
    longest: int = 64
    dropout: float = 0.0
    """Of attention weights."""
    hidden_dropout: float = 0.0


class Attention(nn.Module):
    """Grouped attention of the reader's kind."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.wq = nn.Linear(shape.dim, shape.heads * shape.head_dim, bias=False)
        self.wk = nn.Linear(shape.dim, shape.kv_heads * shape.head_dim, bias=False)
        self.wv = nn.Linear(shape.dim, shape.kv_heads * shape.value_dim, bias=False)
        self.wo = nn.Linear(shape.heads * shape.value_dim, shape.dim, bias=False)

    def forward(self, x_BSD: Tensor, mask: Tensor | None) -> Tensor:
        q = self.wq(x_BSD).unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)
        k = self.wk(x_BSD).unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)
        v = self.wv(x_BSD).unflatten(-1, (-1, self.shape.value_dim)).transpose(1, 2)
        causal = self.shape.kind == "causal"
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=self.shape.dropout, is_causal=causal, enable_gqa=True
        )
        return self.wo(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention on a normed copy, added back, and a product."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(shape.dim)
        self.attention = Attention(shape)
        self.mix = nn.Linear(shape.dim, shape.dim)
        self.hidden_dropout = shape.hidden_dropout

    def forward(self, x_BSD: Tensor, mask: Tensor | None) -> Tensor:
        h_BSD = x_BSD + self.attention(self.norm(x_BSD), mask)
        return h_BSD + F.dropout(torch.tanh(self.mix(h_BSD)), self.hidden_dropout, self.training)


class Reader(nn.Module):
    """Tokens, their positions and documents in, logits out."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.vocabulary, shape.dim)
        self.places = nn.Embedding(shape.longest, shape.dim)
        self.slope = nn.Parameter(torch.linspace(0.1, 0.4, shape.heads))
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.head = nn.Linear(shape.dim, shape.vocabulary, bias=False)

    def forward(self, tokens: Tensor, positions: Tensor, doc_ids: Tensor | None = None) -> Tensor:
        h_BSD = self.embed(tokens) + self.places(positions)
        mask = self.mask(positions, doc_ids)
        for layer in self.layers:
            h_BSD = layer(h_BSD, mask)
        return self.head(h_BSD)

    def mask(self, positions: Tensor, doc_ids: Tensor | None) -> Tensor | None:
        """[B, 1, S, S], [H, S, S] or [B, 1, 1, S]; rows and columns are named, for a table to lay each."""
        if self.shape.kind == "documents":
            assert doc_ids is not None
            rows, columns = ss.name(doc_ids, "rows"), ss.name(doc_ids, "columns")
            at, of = ss.name(positions, "row_places"), ss.name(positions, "column_places")
            return ((rows[:, :, None] == columns[:, None, :]) & (at[:, None] >= of[None, :]))[:, None]
        if self.shape.kind == "biased":
            at, of = ss.name(positions, "row_places"), ss.name(positions, "column_places")
            far = (at[:, None] - of[None, :]).abs().to(self.slope.dtype)
            return -self.slope[:, None, None] * far
        if self.shape.kind == "padded":
            assert doc_ids is not None
            return (ss.name(doc_ids, "columns") >= 0)[:, None, None, :]
        return None


def build(shape: Shape) -> Reader:
    """A reader with weights that let every gradient be far above the tolerance."""
    model = Reader(shape)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and name != "slope":
                parameter.mul_(3)
    return model


HIDDEN = "B@(dp,fsdp) S@(cp,tp) D"
RULES = ss.Rules(
    params={
        r"embed\.weight": "V@(fsdp,cp) D",
        r"places\.weight": "T@(fsdp,cp) D",
        r"slope": "H@tp",
        r"layers\.\d+\.attention\.wq\.weight": "(H@tp hd)@(fsdp,cp) D",
        r"layers\.\d+\.attention\.wk\.weight": "(K@tp hd) D@(fsdp,cp)",
        r"layers\.\d+\.attention\.wv\.weight": "(K@tp hv) D@(fsdp,cp)",
        r"layers\.\d+\.attention\.wo\.weight": "D@(fsdp,cp) (H@tp hv)",
        r"layers\.\d+\.norm\.(weight|bias)": "D@(fsdp,cp)",
        r"layers\.\d+\.mix\.weight": "D@(fsdp,cp) D2",
        r"layers\.\d+\.mix\.bias": "D",
        r"head\.weight": "V@(fsdp,cp) D",
    },
    activations={
        r"tokens|labels|doc_ids": "B@(dp,fsdp) S@cp",
        r"positions": "S@cp",
        r"embed|places|layers\.\d+(\.attention)?": "... S@(cp,tp) D",
    },
    units=[r"layers\.\d+"],
    pipeline=r"layers\.(?P<pp>\d+)",
    sizes={"D2": 16},
)


def table(kind: str, strategy: str) -> ss.Rules:
    """The table that lays a mask as a strategy reads it: all columns, and of rows a rank's or all."""
    rules = RULES.override(
        drop=[r"embed|places|layers\.\d+(\.attention)?"],
        activations={
            r"embed|layers\.\d+(\.attention)?": HIDDEN,
            r"places": "S@(cp,tp) D",
            r"layers\.\d+\.attention:in|head:in": "B@(dp,fsdp) S@cp D",
            r"head": "B@(dp,fsdp) S@cp V",
        },
    )
    rows = strategy == "ulysses"
    named: dict[str, str] = {}
    if kind in ("documents", "padded"):
        named[r"columns|rows" if rows and kind == "documents" else r"columns"] = "B@(dp,fsdp) S"
    if kind in ("documents", "biased"):
        named[r"column_places|row_places" if rows else r"column_places"] = "S"
    if kind != "biased":
        rules = rules.override(params={r"slope": "H"})
    return rules.override(activations=named) if named else rules


def make_batch(step: int = 0, *, rows: int = 8, length: int = 16, documents: bool = True) -> dict[str, Tensor]:
    """A global batch with masked labels; documents of other lengths in each row, 0 to 3."""
    generator = torch.Generator().manual_seed(7 + step)
    tokens = torch.randint(0, 24, (rows, length), generator=generator)
    labels = torch.randint(0, 24, (rows, length), generator=generator)
    masked = torch.rand(rows, length, generator=generator) < torch.linspace(0, 0.9, rows)[:, None]
    batch = {
        "tokens": tokens,
        "labels": labels.masked_fill(masked, -100),
        "positions": torch.arange(length),
    }
    ids = torch.randint(0, 4, (rows, length), generator=generator).sort(-1).values
    return batch | ({"doc_ids": ids} if documents else {})


def has_documents(kind: str) -> bool:
    """Whether a kind reads documents."""
    return kind in ("documents", "padded")


def loss_fn(output: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The summed cross-entropy and the number of labels that count."""
    return ss.cross_entropy(output, batch["labels"])


def plain_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The mean over the labels that count, by torch's own function."""
    given = {name: item for name, item in batch.items() if name != "labels"}
    return F.cross_entropy(model(**given).flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
